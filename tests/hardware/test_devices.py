"""GPUs or the CPU: never the CPU by mistake, and no noise where there is no GPU."""

import os
import subprocess
import sys
import types

import pytest

from gpt3jax import errors
from gpt3jax.config import command_line
from gpt3jax.hardware import devices, driver, nvidia_smi

import corpus


@pytest.fixture
def choose(tmp_path, monkeypatch):
    """Return a function that chooses on a machine with or without a GPU, and returns the choice."""
    gpu = tmp_path / "nvidia0"
    monkeypatch.setattr(nvidia_smi, "GPU_FILES", (str(tmp_path / "nvidia[0-9]*"),))
    environment = {k: v for k, v in os.environ.items() if k[:4] not in ("CUDA", "XLA_", "JAX_")}
    monkeypatch.setattr(os, "environ", environment)
    monkeypatch.setattr(driver, "newest_cuda", lambda: (13, 0))
    monkeypatch.setattr(nvidia_smi, "capabilities", lambda: {(9, 0)})

    def call(has_gpu, asked=None, cpu_devices=0, has_cuda=True):
        gpu.touch() if has_gpu else gpu.unlink(missing_ok=True)
        settings = {"jax_platforms": asked}
        fake = types.SimpleNamespace(values=settings, update=settings.__setitem__)
        monkeypatch.setattr(devices, "jax", types.SimpleNamespace(config=fake))
        monkeypatch.setattr(devices, "installed_cuda", lambda: 13 * has_cuda)
        devices.choose(cpu_devices)
        return settings

    return call


def test_the_machine_decides_where_nobody_does(choose):
    assert choose(has_gpu=True) == {"jax_platforms": "cuda,cpu"}
    assert choose(has_gpu=False) == {"jax_platforms": "cpu"}
    assert choose(has_gpu=False, has_cuda=False) == {"jax_platforms": "cpu"}


def test_who_asks_for_the_cpu_gets_it(choose):
    for has_gpu in (True, False):
        for asked in (None, "cuda,cpu"):
            settings = choose(has_gpu, asked, cpu_devices=4)
            assert settings == {"jax_platforms": "cpu", "jax_num_cpu_devices": 4}
        assert choose(has_gpu, "cpu", has_cuda=False) == {"jax_platforms": "cpu"}


@pytest.mark.parametrize("asked", ["cuda", "cuda,cpu", "gpu"])
def test_who_asks_for_gpus_does_not_get_the_cpu(choose, asked):
    assert choose(has_gpu=True, asked=asked) == {"jax_platforms": asked}
    with pytest.raises(errors.UserError) as error:
        choose(has_gpu=False, asked=asked)
    assert f"JAX_PLATFORMS={asked}, but no NVIDIA GPU is visible" in str(error.value)
    assert "JAX_PLATFORMS=cpu" in str(error.value)


def test_a_gpu_is_not_left_idle_for_want_of_cuda(choose):
    with pytest.raises(errors.UserError) as error:
        choose(has_gpu=True, has_cuda=False)
    assert "nvidia0), but JAX is installed without CUDA" in str(error.value)
    assert "gpt3jax[cuda13]" in str(error.value) and "JAX_PLATFORMS=cpu" in str(error.value)


def test_a_driver_that_is_too_old_is_refused_before_jax_starts(choose, monkeypatch):
    monkeypatch.setattr(driver, "newest_cuda", lambda: (12, 4))
    with pytest.raises(errors.UserError, match="needs driver 580 or newer"):
        choose(has_gpu=True)
    assert choose(has_gpu=True, asked="cpu") == {"jax_platforms": "cpu"}


def test_a_run_on_gpus_puts_into_the_environment_what_a_user_has_not(choose):
    choose(has_gpu=False)
    choose(has_gpu=True, cpu_devices=2)
    assert not any(name.startswith("XLA_") for name in os.environ)
    os.environ["XLA_FLAGS"] = "--xla_mine=1"
    choose(has_gpu=True)
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.92"
    assert os.environ["CUDA_DEVICE_MAX_CONNECTIONS"] == "1"
    assert "nic_speed_gbps=45" in os.environ["XLA_FLAGS"]
    assert os.environ["XLA_FLAGS"].endswith(" --xla_mine=1")
    assert os.environ["JAX_PLATFORMS"] == "cuda,cpu"
    os.environ["XLA_CLIENT_MEM_FRACTION"] = "0.5"
    choose(has_gpu=True)
    assert os.environ["XLA_CLIENT_MEM_FRACTION"] == "0.5"


@pytest.mark.parametrize(
    ("said", "capability"), [("9.0", (9, 0)), ("12.1", (12, 1)), ("gfx942", None), (None, None)]
)
def test_the_compute_capability_is_that_of_nvidias_gpus(said, capability):
    device = types.SimpleNamespace(**({"compute_capability": said} if said else {}))
    assert devices.compute_capability(device) == capability


@pytest.mark.parametrize("hidden", ["", "-1", "NoDevFiles"])
def test_hidden_gpus_are_not_wanted(choose, hidden):
    os.environ["CUDA_VISIBLE_DEVICES"] = hidden
    assert choose(has_gpu=True) == {"jax_platforms": "cpu"}
    os.environ["CUDA_VISIBLE_DEVICES"] = "0"
    assert choose(has_gpu=True) == {"jax_platforms": "cuda,cpu"}


@pytest.mark.parametrize(
    "message, status, words",
    [
        (
            "Unable to initialize backend 'cuda': Backend 'cuda' is not in the list of known "
            "backends: ['cpu', 'tpu']. (set JAX_PLATFORMS='' to automatically choose an available "
            "backend)",
            errors.REFUSED,
            "['cpu', 'tpu']: CUDA's libraries are missing",
        ),
        (
            "Unable to initialize backend 'cuda': FAILED_PRECONDITION: No visible GPU devices. "
            "(set JAX_PLATFORMS='' to automatically choose an available backend)",
            errors.RETRY,
            "No visible GPU devices: see nvidia-smi",
        ),
    ],
)
def test_what_jax_says_of_gpus_that_it_cannot_start_becomes_a_line(capsys, message, status, words):
    def fail():
        raise RuntimeError(message)

    assert command_line.run(fail) == status
    line = capsys.readouterr().err
    assert words in line and line.count("\n") == 1 and "JAX_PLATFORMS=''" not in line


def test_another_error_stays_one():
    def fail():
        raise RuntimeError("Unable to do this")

    with pytest.raises(RuntimeError):
        command_line.run(fail)


START = """
import sys
from jax._src import hardware_utils
from gpt3jax.config import command_line, schema
from gpt3jax.distributed import joining
from gpt3jax.hardware import devices, driver, nvidia_smi
from gpt3jax.sharding import meshes
if len(sys.argv) > 1:
    nvidia_smi.GPU_FILES = (sys.argv[1],)
    hardware_utils.has_visible_nvidia_gpu = lambda: True
def start():
    joining.start(schema.Distributed(), schema.Mesh())
    print(meshes.make_mesh(schema.Mesh()).devices.flat[0].platform)
sys.exit(command_line.run(start))
"""


def start_devices(*arguments):
    environ = {k: v for k, v in os.environ.items() if k not in ("JAX_PLATFORMS", "XLA_FLAGS")}
    environ["PYTHONPATH"] = str(corpus.REPOSITORY)
    call = [sys.executable, "-c", START, *map(str, arguments)]
    return subprocess.run(call, env=environ, capture_output=True, text=True, timeout=120)


@pytest.mark.skipif(bool(devices.visible_gpu()), reason="has a GPU")
def test_without_a_gpu_the_cpu_is_used_quietly():
    """With the extra `plan` as well: JAX would start its plugin, and print that it cannot."""
    done = start_devices()
    assert (done.returncode, done.stdout, done.stderr) == (0, "cpu\n", "")


@pytest.mark.skipif(bool(devices.visible_gpu()), reason="has a GPU")
@pytest.mark.skipif(not devices.installed_cuda(), reason="not installed: the extra plan")
def test_the_compiler_of_the_extra_plan_is_no_cuda(tmp_path):
    """A machine with a GPU where the extra `plan` alone is installed."""
    (tmp_path / "nvidia0").touch()
    done = start_devices(tmp_path / "nvidia0")
    assert done.returncode == errors.REFUSED and not done.stdout
    last = done.stderr.splitlines()[-1]
    assert last.startswith("gpt3jax: error: Unable to initialize backend 'cuda'"), done.stderr
    assert "gpt3jax[cuda13]" in last and "JAX_PLATFORMS=cpu" in last
