"""What a process reports about itself for comparison: code, settings, files, devices, program.

All values are short texts. Nothing here communicates, and `of_host` uses no device.
"""

import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import re
import socket
import tempfile
import time
from collections.abc import Mapping

import jax

from gpt3jax import errors, step
from gpt3jax.config import schema, user_paths
from gpt3jax.data import blend
from gpt3jax.hardware import nvidia_smi

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
    "orbax-checkpoint", "grain", "numpy", "jax-triton", "triton",
)  # fmt: skip
_PREFIXES = ("XLA_", "JAX_", "NCCL_", "TF_XLA_", "CUDA_DEVICE_")
_OWN = {  # may differ between processes or hosts
    "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_LOCAL_DEVICE_IDS",
    "JAX_PROCESS_ID", "JAX_COMPILATION_CACHE_DIR", "JAX_PARTITION_INDEX", "JAX_SLICE_INDEX",
    "NCCL_HOSTID",
}  # fmt: skip
_N_PIECES = 32  # of a file, to read besides its head
_PIECE_BYTES, _HEAD_BYTES = 4096, 1 << 16
_LOOKS = 5  # attempts to see a file that another host has just written: network folders may lag
FOLDERS = {"checkpoint.dir": "fail", "log.dir": "warn"}  # the result if it is not shared
OF_FILES = ("code", "versions", "corpus", "folders")
N_DEVICES, KIND = "devices of a process", "kind of device"
ERROR = "cannot be read: "


def of_host(
    cfg: schema.Config, token: str, *, first: bool, with_files: bool = True
) -> dict[str, dict[str, str] | None]:
    """Return all facts that need no device.

    Args:
        cfg: the run's config.
        token: part of the name of the file that process 0 has put into each folder.
        first: whether this is process 0, whose folders `plant` has checked.
        with_files: look at files too; without, another process of this node does, and what it
            reports of them is None here.
    """
    flat = schema.flatten(cfg)
    del flat["distributed.process_id"]
    of_files: dict[str, dict[str, str] | None] = dict.fromkeys(OF_FILES)
    if with_files:
        of_files = {
            "code": sources(),
            "versions": versions(),
            "corpus": corpus(cfg.data),
            "folders": {} if first else folders(cfg, token),
        }
    return {
        **of_files,
        "environment": environment(os.environ),
        "config": {name: str(value) for name, value in flat.items()},
    }


def host() -> str:
    """Return this machine's name."""
    return socket.gethostname()


def sources() -> dict[str, str]:
    """Return a digest of each source file of the package."""
    package = pathlib.Path(__file__).parent.parent
    files = sorted(package.rglob("*.py"))
    return {f"gpt3jax/{f.relative_to(package)}": _digest(f.read_bytes()) for f in files}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what is computed."""
    numbers = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            numbers[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            numbers[name] = "absent"
    return numbers


def environment(variables: Mapping[str, str]) -> dict[str, str]:
    """Return the variables of XLA, JAX, NCCL and CUDA that should be the same in all processes."""
    return {k: v for k, v in variables.items() if k.startswith(_PREFIXES) and k not in _OWN}


def corpus(data: schema.Data) -> dict[str, str]:
    """Return a fingerprint, or an error, for each file of the corpus and the tokenizer."""
    if data.from_text:  # made at the first start
        return {}
    files = [f for f in (data.vocab_file, data.merge_file, data.tokenizer) if f]
    for words in (data.paths, data.train_paths, data.validation_paths, data.test_paths):
        for prefix in blend.parse(words)[0] if words else []:
            files += [f"{prefix}.idx", f"{prefix}.bin"]
    return {file: fingerprint(file) for file in dict.fromkeys(files)}


def fingerprint(file: str) -> str:
    """Return a file's size and a digest of its head and of evenly spaced pieces, or an error.

    It reads 64 KiB and 32 pieces of 4 KiB, the last at the end, so its time does not depend on the
    size.
    """
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(stream.read(_HEAD_BYTES))
            for i in range(1, _N_PIECES + 1):
                stream.seek(max(size - _PIECE_BYTES, 0) * i // _N_PIECES)
                digest.update(stream.read(_PIECE_BYTES))
    except OSError as error:
        return f"{ERROR}{error.strerror.lower() if error.strerror else error}"
    return f"{size:,} bytes, digest {digest.hexdigest()[:12]}"


def plant(cfg: schema.Config, token: str) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Put a file into each of the run's folders; return what to `uproot`, and problems."""
    planted: list[pathlib.Path] = []
    problems = {}
    for name, folder in _folders(cfg).items():
        try:
            user_paths.check_not_a_step(folder)
            made = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            planted = [*made, *planted]
            (folder / _probe(token)).write_text(token)
            planted.insert(0, folder / _probe(token))
        except OSError as error:
            problems[name] = _not_writable(folder, error)
        except errors.UserError as error:
            problems[name] = error.message
    return planted, problems


def uproot(planted: list[pathlib.Path]) -> None:
    """Remove what `plant` created; a folder that is no longer empty stays."""
    for path in planted:
        try:
            path.rmdir() if path.is_dir() else path.unlink()
        except OSError:
            continue


def folders(cfg: schema.Config, token: str) -> dict[str, str]:
    """Return the problems of the run's folders, as seen from a process other than process 0."""
    problems = {}
    for name, folder in _folders(cfg).items():
        if not _appears(folder / _probe(token)):
            problems[name] = f"{folder} is not the first process's: its file does not appear here"
        elif FOLDERS[name] == "fail":  # every process writes its part of a checkpoint
            try:
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"0")
            except OSError as error:
                problems[name] = _not_writable(folder, error)
    return problems


def _folders(cfg: schema.Config) -> dict[str, pathlib.Path]:
    flat = schema.flatten(cfg)
    return {name: pathlib.Path(flat[name]) for name in FOLDERS if flat[name]}


def _appears(file: pathlib.Path) -> bool:
    for look in range(_LOOKS):
        try:
            if file.exists():
                return True
        except OSError:  # no permission for a folder on the way: this process cannot use the file
            return False
        if look < _LOOKS - 1:
            time.sleep(0.2)
    return False


def _probe(token: str) -> str:
    return f".preflight-{token}"


def _not_writable(folder: pathlib.Path, error: OSError) -> str:
    return f"{folder} cannot be written: {(error.strerror or str(error)).lower()}"


def devices() -> dict[str, str]:
    """Return the number and kind of this process's devices; this initializes them."""
    local = jax.local_devices()
    kinds = sorted({f"{d.device_kind} ({d.platform})" for d in local})
    return {N_DEVICES: str(len(local)), KIND: " and ".join(kinds)}


def free_bytes() -> dict[str, int]:
    """Return the free bytes of each local device, by its number, if it reports them."""
    free = {}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            free[str(device.id)] = int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return free


def used_gpus() -> dict[str, int]:
    """Return the bytes in use on each GPU that nvidia-smi shows, by its UUID.

    Called before any process of the run has initialized its devices, so others use these bytes.
    """
    rows = nvidia_smi.query("uuid", "memory.used", timeout=20)
    return {uuid: int(mib) << 20 for uuid, mib in rows if mib.isdecimal()}


def program(built: step.Program, cfg: schema.Config, batch_size: int) -> str:
    """Return the length and digest of the training step's lowered program for this batch size.

    The digest covers XLA's options too. Collectives hang where programs differ. JAX keeps the
    lowering, and the first step compiles it: nothing is traced or lowered twice.
    """
    with jax.set_mesh(built.mesh):
        args = step.abstract_args(built, cfg, batch_size)
        text = built.train.jitted.lower(*args).as_text()
    # Kernels of Triton, which hold the paths of their source: code and versions are compared apart.
    text = re.sub(r'(?m)^(.*@triton_kernel_call.*?)"[^"]{1000,}"', r'\1""', text)
    return f"{len(text):,} characters, digest {_digest(f'{text}{built.train.options}'.encode())}"


def digest(value: object) -> str:
    """Return a digest of a value that can be JSON."""
    return _digest(json.dumps(value, sort_keys=True).encode())


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
