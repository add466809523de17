"""Our attention kernels compiled for GPUs that are not here: XLA's program and machine code."""

import importlib.util
import os
import pathlib
import re
import subprocess
import sys

import pytest

from gpt3jax.hardware import gpus
from gpt3jax.model import triton_attention
from gpt3jax.plan import compiler, hlo

pytestmark = pytest.mark.skipif(
    bool(compiler.missing_extra() or triton_attention.missing()),
    reason="needs the extras plan and triton",
)
KERNELS = ["backward_keys", "backward_queries", "forward"]
PROGRAM = pathlib.Path(__file__).parents[1] / "triton_program.py"


def compile_program(repository, folder, *args):
    """Return the program's text and the folders with each kernel's code; Triton writes no other."""
    home, dump = folder / "home", folder / "dump"
    home.mkdir()
    environment = {
        **os.environ, "JAX_PLATFORMS": "cpu", "JAX_SKIP_CUDA_CONSTRAINTS_CHECK": "1",
        "JAX_ENABLE_COMPILATION_CACHE": "false", "JAX_TRITON_DUMP_DIR": str(dump),
        "HOME": str(home), "PYTHONPATH": str(repository),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, PROGRAM, *args], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "Warning" not in done.stderr
    # Processes of one node would meet there.
    assert not [*home.iterdir()], "Triton keeps files"
    return done.stdout, sorted(dump.glob("*/*.ptx"), key=lambda file: file.name)


def assemble(file, gpu, folder):
    """Return what the assembler of CUDA 12.9, which Triton brings, says of a kernel."""
    (triton,) = importlib.util.find_spec("triton").submodule_search_locations
    target = re.search(r"^\.target (\w+)", file.read_text(), re.MULTILINE)[1]
    assert target.removesuffix("a") == "sm_{}{}".format(*gpu.capability)
    command = [f"{triton}/backends/nvidia/bin/ptxas", "-v", f"--gpu-name={target}", str(file)]
    command += ["-o", str(folder / "kernel.cubin")]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def slower(*values):
    return pytest.param(*values, marks=pytest.mark.slower)


@pytest.mark.parametrize(
    ("name", "dtype", "d_head", "split"),
    [
        ("h100", "bfloat16", 64, False),
        slow("h100", "float16", 64, True),
        slower("h100", "float16", 80, False),
        slower("h100", "bfloat16", 128, True),
        slower("h100", "float16", 128, False),
        slow("a100", "bfloat16", 128, False),
        slow("b200", "float16", 128, False),
        *(
            slower(name, dtype, d_head, False)
            for name in ("a100", "b200")
            for dtype, d_head in (("bfloat16", 64), ("float16", 64))
        ),
        slower("a100", "float16", 128, False),
        slower("b200", "bfloat16", 128, False),
    ],
)
def test_three_kernels_compile(repository, tmp_path, name, dtype, d_head, split):
    gpu = gpus.GPUS[name]
    args = [name, dtype, str(d_head), *["split"] * split]
    text, files = compile_program(repository, tmp_path, *args)
    calls = re.findall(r'custom_call_target="(triton_kernel_call\w*)".*op_name="([^"]*)"', text)
    assert len({target for target, _ in calls}) == 1
    names = [re.findall(r"/triton_(\w+)/", scope)[-1] for _, scope in calls]
    assert sorted(name.removesuffix("_window_100") for name in names) == KERNELS
    assert hlo.fused_attention(text) == {"forward": True, "backward": True}
    assert [file.stem for file in files] == KERNELS
    for file in files:
        code = file.read_text()
        assert not re.search(r"\b(atom|red)\.", code), "results would not repeat"
        said = assemble(file, gpu, tmp_path)
        assert "0 bytes spill stores, 0 bytes spill loads" in said
        used = file.with_suffix(".compile_info").read_text()
        assert int(re.search(r"shared_mem_bytes: (\d+)", used)[1]) <= gpu.shared_per_block
