"""The image, without a Docker daemon: what it copies is there, and its one script installs."""

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
    (kind,) = instructions("ARG ")
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert kind[0].removeprefix("KIND=") in project["optional-dependencies"]
    assert instructions("USER ") == [["1000"]], "Kubernetes' runAsNonRoot wants a number"
    assert re.search(r"FROM \S+:\S*\d{8}\S*$", DOCKERFILE.read_text(), re.MULTILINE), "not pinned"


def test_constraints_allow_what_the_package_asks_for():
    packaging = pytest.importorskip("packaging.requirements")
    lines = (REPOSITORY / "launch" / "constraints.txt").read_text().splitlines()
    pins = dict(line.lower().split("==") for line in lines if not line.startswith("#"))
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    for text in project["dependencies"]:
        requirement = packaging.Requirement(text)
        assert requirement.specifier.contains(pins[requirement.name.lower()]), text


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
