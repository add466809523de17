"""An old NVIDIA driver is named, with what to do, before JAX only says that there is no GPU."""

import ctypes
import shutil
import subprocess

import pytest

from gpt3jax import errors
from gpt3jax.hardware import driver, nvidia_smi


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """Return a function that stands for a machine whose driver runs CUDA up to a version."""
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 550.54.14\necho 550.54.14\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")

    def call(version):
        monkeypatch.setattr(driver, "newest_cuda", lambda: version)

    return call


def test_a_driver_that_is_too_old_for_the_installed_cuda_is_named(machine):
    machine((12, 4))
    with pytest.raises(errors.UserError) as error:
        driver.check(13)
    told = str(error.value)
    assert "NVIDIA's driver 550.54.14 runs CUDA up to 12.4" in told
    assert "installed with CUDA 13, which needs driver 580 or newer" in told
    assert "gpt3jax[cuda12]" in told and "launching.md#drivers" in told
    machine((11, 8))
    with pytest.raises(errors.UserError, match=r"needs driver 525.60 or newer: update the driver "):
        driver.check(12)
    with pytest.raises(errors.UserError, match="installed with CUDA 14: update the driver"):
        driver.check(14)  # of which nothing is known yet


@pytest.mark.parametrize("version", [(12, 0), (12, 9), (13, 0), None])
def test_newer_drivers_run_older_cudas_of_any_minor_version(machine, version):
    machine(version)
    driver.check(12)


def test_without_nvidias_library_nothing_is_checked(monkeypatch):
    def missing(name):
        raise OSError(name)

    monkeypatch.setattr(ctypes, "CDLL", missing)
    assert driver.newest_cuda() is None


@pytest.mark.skipif(not shutil.which("cc"), reason="not installed: cc")
def test_the_version_is_what_the_drivers_library_says(tmp_path, monkeypatch):
    source, library = tmp_path / "cuda.c", tmp_path / "libcuda.so.1"
    source.write_text("int cuDriverGetVersion(int *version) { *version = 12040; return 0; }")
    subprocess.run(["cc", "-shared", "-o", library, source], check=True)
    load = ctypes.CDLL
    monkeypatch.setattr(ctypes, "CDLL", lambda name: load(str(tmp_path / name)))
    assert driver.newest_cuda() == (12, 4)


def test_compute_capabilities_are_read_from_nvidia_smi(tmp_path, monkeypatch):
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\necho 9.0\necho 9.0\necho '[N/A]'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=":")
    assert nvidia_smi.capabilities() == {(9, 0)}
    monkeypatch.setenv("PATH", str(tmp_path / "empty"))
    assert nvidia_smi.capabilities() == set()
