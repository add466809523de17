"""What nvidia-smi reports about the GPUs of this machine; nothing else runs it. Imports no JAX."""

import glob
import subprocess

GPU_FILES = ("/dev/nvidia[0-9]*", "/dev/nvidiactl", "/usr/lib/wsl/lib/libcuda.so.1")


def gpu_file() -> str:
    """Return the file that shows an NVIDIA GPU, "" where there is none; nvidia-smi may fail."""
    return next((file for pattern in GPU_FILES for file in sorted(glob.glob(pattern))), "")


def query(*fields: str, timeout: float | None = None) -> list[list[str]]:
    """Return the values of these fields, a row for each GPU; no rows if nvidia-smi fails."""
    command = ["nvidia-smi", f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=timeout)
    except (OSError, subprocess.SubprocessError):
        return []
    rows = [[value.strip() for value in line.split(",")] for line in done.stdout.splitlines()]
    return [row for row in rows if len(row) == len(fields)]


def capabilities() -> set[tuple[int, int]]:
    """Return the compute capabilities of this machine's GPUs; none if nvidia-smi fails."""
    values = [row[0].split(".") for row in query("compute_cap", timeout=20)]
    return {(int(v[0]), int(v[1])) for v in values if len(v) == 2 and all(map(str.isdecimal, v))}
