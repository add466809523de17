"""The image, without a Docker daemon: what it copies is there, its script installs, it is built."""

import importlib.metadata
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tomllib

import pytest

import corpus

REPOSITORY = corpus.REPOSITORY
DOCKERFILE = REPOSITORY / "launch" / "Dockerfile"


def instructions(name):
    """Return the arguments of each instruction of that name, with continued lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    return [line.removeprefix(name).split() for line in text.splitlines() if line.startswith(name)]


def copied():
    return [source for *sources, _ in instructions("COPY ") for source in sources]


def test_what_the_image_copies_is_there_and_let_through_by_dockerignore():
    let_through = {
        line[1:]
        for line in (REPOSITORY / ".dockerignore").read_text().splitlines()
        if line[0] == "!"
    }
    assert set(copied()) == let_through
    assert all((REPOSITORY / source).exists() for source in copied())


def test_the_image_is_made_by_the_script_that_tests_run():
    (run,) = instructions("RUN ")
    assert run[:3] == ["launch/install.sh", '"$KIND"', "/opt/venv"]
    (base,), (kind,) = instructions("ARG ")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert kind.removeprefix("KIND=") in project["optional-dependencies"]
    assert instructions("USER ") == [["1000"]], "Kubernetes' runAsNonRoot wants a number"
    assert instructions("FROM ") == [["$BASE"]]
    assert re.fullmatch(r"BASE=\S+:\S*\d{8}\S*@sha256:[0-9a-f]{64}", base), "not pinned"


def pinned():
    lines = (REPOSITORY / "launch" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    return {name.replace("_", "-"): version for name, version in pins.items()}


def test_constraints_allow_what_the_package_asks_for():
    packaging = pytest.importorskip("packaging.requirements")
    pins = pinned()
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = packaging.Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


@pytest.mark.parametrize("kind", ["cuda13", "cuda12"])
def test_constraints_pin_cudas_libraries(kind):
    """An image for GPUs can be built again: of what jax and its plugin ask for, nothing is open."""
    requirements = pytest.importorskip("packaging.requirements")
    pins = pinned()
    plugin = f"jax-{kind}-plugin"
    assert pins[plugin] == pins[f"jax-{kind}-pjrt"] == pins["jax"]
    libraries = {"cudnn", "nccl", "cublas", "cuda-nvcc", "cuda-runtime", "nvjitlink", "nvshmem"}
    ending = f"-cu{kind.removeprefix('cuda')}"
    for library in libraries:
        assert {f"nvidia-{library}", f"nvidia-{library}{ending}"} & set(pins), library
    try:
        asked = importlib.metadata.requires(plugin)
    except importlib.metadata.PackageNotFoundError:
        return  # not installed here: what it asks for is not known
    for requirement in map(requirements.Requirement, asked):
        if requirement.marker and requirement.marker.evaluate({"extra": "with-cuda"}):
            assert requirement.specifier.contains(pins[requirement.name.lower()]), requirement


@pytest.mark.parametrize("kind", ["cuda11", "gpu"])
def test_an_unknown_kind_is_refused(tmp_path, kind):
    script = REPOSITORY / "launch" / "install.sh"
    done = subprocess.run([script, kind], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 2 and f"{kind} is none of the three" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.mark.slower
def test_the_script_installs_into_a_clean_folder_and_the_result_trains(tmp_path):
    """As the image does: only what it copies, no PYTHONPATH, a new virtual environment."""
    source = tmp_path / "gpt3jax"
    source.mkdir()
    for name in copied():
        copy = shutil.copytree if (REPOSITORY / name).is_dir() else shutil.copy
        copy(REPOSITORY / name, source / name)
    clean = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    clean["PYTHON"] = str(pathlib.Path(sys.base_prefix) / "bin" / "python3")
    installed = subprocess.run(
        ["launch/install.sh", "cpu", "venv"], cwd=source, env=clean, capture_output=True, text=True
    )
    assert installed.returncode == 0, installed.stderr
    python = source / "venv" / "bin" / "python"
    assert installed.stdout.endswith(f"{python} -m gpt3jax.main --config=RECIPE.py\n")
    trained = subprocess.run(
        [python, "-m", "gpt3jax.main", f"--config={source}/configs/quickstart.py",
         "--train.n-steps=2", "--train.eval-batches=1", "--checkpoint.dir=checkpoints"],
        cwd=tmp_path, env=clean, capture_output=True, text=True,
    )  # fmt: skip
    assert trained.returncode == 0, trained.stderr
    assert "the run is complete: step 2, 32 samples" in trained.stdout


BUILDER = shutil.which("buildah") or shutil.which("podman")
# What the image is asked to do once it is built, as its own user.
TRAINS = """
FROM localhost/gpt3jax
ENV JAX_PLATFORMS=cpu
WORKDIR /tmp
RUN id -u && python3 -m gpt3jax.main --config=/opt/gpt3jax/configs/quickstart.py \\
    --train.n-steps=5 --train.eval-batches=1
"""


@pytest.fixture
def build(tmp_path):
    """Yield a function that builds an image in a storage of its own: status, what it prints."""
    storage = [f"--root={tmp_path}/root", f"--runroot={tmp_path}/run", "--storage-driver=vfs"]
    # A network may have a certificate of its own, which pip is told of.
    volumes = []
    if certificate := os.environ.get("PIP_CERT"):
        (tmp_path / "pip.conf").write_text("[global]\ncert = /mnt/certificate.pem\n")
        volumes.append(f"--volume={certificate}:/mnt/certificate.pem:ro")
        volumes.append(f"--volume={tmp_path}/pip.conf:/etc/pip.conf:ro")

    def call(command, *arguments):
        options = ["--isolation=chroot", "--layers=false", *volumes] if command == "build" else []
        done = subprocess.run(
            [BUILDER, *storage, command, *options, *arguments],
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
        )  # fmt: skip
        return done.returncode, done.stdout

    yield call
    for folder in ("root", "run", "debian"):  # gigabytes
        shutil.rmtree(tmp_path / folder, ignore_errors=True)


def base_image(build, folder):
    """Return the base of the Dockerfile; where no registry is reached, a Debian made by apt."""
    (base,), _ = instructions("ARG ")
    pinned_base = base.removeprefix("BASE=")
    if build("pull", "--quiet", pinned_base)[0] == 0:
        return pinned_base
    if not shutil.which("debootstrap"):
        pytest.skip("no registry is reached, and not installed: debootstrap")
    made = subprocess.run(
        ["debootstrap", "--variant=minbase", "bookworm", folder / "debian"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    if made.returncode:
        pytest.skip(f"no registry is reached, nor Debian's packages: {made.stdout[-300:]}")
    (folder / "Base").write_text("FROM scratch\nADD debian /\n")
    status, told = build("build", "-t", "localhost/base", "-f", str(folder / "Base"), str(folder))
    assert status == 0, told
    return "localhost/base"


@pytest.mark.slower
@pytest.mark.skipif(not BUILDER, reason="not installed: buildah or podman")
@pytest.mark.skipif(os.geteuid() != 0, reason="needs root: chroot")
def test_the_image_is_built_and_trains_as_its_own_user(build, tmp_path):
    base = base_image(build, tmp_path)
    image = ["--build-arg", f"BASE={base}", "--build-arg", "KIND=cpu", "-t", "localhost/gpt3jax"]
    status, told = build("build", *image, "-f", str(DOCKERFILE), str(REPOSITORY))
    assert status == 0, told[-4000:]
    (tmp_path / "Trains").write_text(TRAINS)
    (tmp_path / "empty").mkdir()
    status, told = build("build", "-f", str(tmp_path / "Trains"), str(tmp_path / "empty"))
    assert status == 0, told[-4000:]
    assert "the run is complete: step 5, 80 samples" in told and "\n1000\n" in told
