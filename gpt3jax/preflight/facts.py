"""What a process tells of itself, for comparison with others: code, settings, files, devices.

All values are short texts. Nothing here talks to another process, and `of_host` touches no device.
"""

import hashlib
import importlib.metadata
import os
import pathlib
import platform
import socket
import subprocess
import tempfile
import time
from typing import Any

import jax

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.data import blend

_PACKAGES = (
    "jax", "jaxlib", "jax-cuda12-plugin", "jax-cuda13-plugin", "flax", "optax",
    "orbax-checkpoint", "grain", "numpy",
)  # fmt: skip
_PREFIXES = ("XLA_", "JAX_", "NCCL_", "TF_XLA_")
# Each process's or host's own.
_OWN = {
    "JAX_COORDINATOR_ADDRESS", "JAX_COORDINATOR_BIND_ADDRESS", "JAX_LOCAL_DEVICE_IDS",
    "JAX_PROCESS_ID", "JAX_COMPILATION_CACHE_DIR", "JAX_PARTITION_INDEX", "JAX_SLICE_INDEX",
    "NCCL_HOSTID",
}  # fmt: skip
_PIECES, _PIECE, _HEAD = 32, 4096, 1 << 16  # of a file: how many are read, of how many bytes
_LOOKS = 5  # for a file that another host has just written: network folders may lag
FOLDERS = {"checkpoint.dir": "fail", "log.dir": "warn"}  # and what it means if one is not shared


def of_host(cfg: schema.Config, token: str, first: bool) -> dict[str, dict[str, str]]:
    """Return all that can be told before a device is touched.

    Args:
        cfg: the run's config.
        token: in the name of the file that the first process has put into each folder.
        first: this is the first process; its folders are known to `plant`.
    """
    flat = schema.flatten(cfg)
    del flat["distributed.process_id"]
    return {
        "code": sources(),
        "versions": versions(),
        "environment": environment(os.environ),
        "config": {name: str(value) for name, value in flat.items()},
        "corpus": corpus(cfg.data),
        "folders": {} if first else folders(cfg, token),
    }


def host() -> str:
    """Return this machine's name."""
    return socket.gethostname()


def sources() -> dict[str, str]:
    """Return a digest of each of the package's files."""
    package = pathlib.Path(__file__).parent.parent
    files = sorted(package.rglob("*.py"))
    return {f"gpt3jax/{f.relative_to(package)}": _digest(f.read_bytes()) for f in files}


def versions() -> dict[str, str]:
    """Return the versions of Python and of the packages that decide what is computed."""
    found = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "absent"
    return found


def environment(variables: Any) -> dict[str, str]:
    """Return the variables that XLA, JAX and NCCL read and that should be the same everywhere."""
    return {k: v for k, v in variables.items() if k.startswith(_PREFIXES) and k not in _OWN}


def corpus(data: schema.Data) -> dict[str, str]:
    """Return a fingerprint, or an error, of each file that the data is read from."""
    if data.from_text:  # made at the first start
        return {}
    files = [f for f in (data.vocab_file, data.merge_file, data.tokenizer) if f]
    for words in (data.paths, data.train_paths, data.validation_paths, data.test_paths):
        for prefix in blend.parse(words)[0] if words else []:
            files += [f"{prefix}.idx", f"{prefix}.bin"]
    return {file: fingerprint(file) for file in dict.fromkeys(files)}


def fingerprint(file: str) -> str:
    """Return a file's size and the digest of its head and of pieces all over it, or an error.

    64 KiB, and 32 pieces of 4 KiB evenly spread to the end: a corpus of any size takes as long.
    """
    digest = hashlib.sha256()
    try:
        with open(file, "rb") as stream:
            size = os.fstat(stream.fileno()).st_size
            digest.update(stream.read(_HEAD))
            for i in range(1, _PIECES + 1):
                stream.seek(max(size - _PIECE, 0) * i // _PIECES)
                digest.update(stream.read(_PIECE))
    except OSError as error:
        return f"{ERROR}{error.strerror.lower() if error.strerror else error}"
    return f"{size:,} bytes, digest {digest.hexdigest()[:12]}"


ERROR = "cannot be read: "


def plant(cfg: schema.Config, token: str) -> tuple[list[pathlib.Path], dict[str, str]]:
    """Put a file into each of the run's folders; return what to `uproot`, and what went wrong."""
    planted: list[pathlib.Path] = []
    wrong = {}
    for name, folder in _folders(cfg).items():
        try:
            user_paths.check_not_a_step(folder)
            made = [p for p in (folder, *folder.parents) if not p.exists()]
            folder.mkdir(parents=True, exist_ok=True)
            planted = [*made, *planted]
            (folder / _probe(token)).write_text(token)
            planted.insert(0, folder / _probe(token))
        except OSError as error:
            wrong[name] = _not_writable(folder, error)
        except errors.UserError as error:
            wrong[name] = str(error)
    return planted, wrong


def uproot(planted: list[pathlib.Path]) -> None:
    """Remove what `plant` made; a folder that something else has come into stays."""
    for path in planted:
        try:
            path.rmdir() if path.is_dir() else path.unlink()
        except OSError:
            continue


def folders(cfg: schema.Config, token: str) -> dict[str, str]:
    """Return what is wrong with the run's folders here, seen from another process."""
    wrong = {}
    for name, folder in _folders(cfg).items():
        if not _appears(folder / _probe(token)):
            wrong[name] = f"{folder} is not the first process's: its file does not appear here"
        elif FOLDERS[name] == "fail":  # every process writes its part of a checkpoint
            try:
                with tempfile.TemporaryFile(dir=folder) as file:
                    file.write(b"0")
            except OSError as error:
                wrong[name] = _not_writable(folder, error)
    return wrong


def _folders(cfg: schema.Config) -> dict[str, pathlib.Path]:
    flat = schema.flatten(cfg)
    return {name: pathlib.Path(flat[name]) for name in FOLDERS if flat[name]}


def _appears(file: pathlib.Path) -> bool:
    for look in range(_LOOKS):
        try:
            if file.exists():
                return True
        except OSError:  # no permission on the way: not there, as far as this process goes
            return False
        if look < _LOOKS - 1:
            time.sleep(0.2)
    return False


def _probe(token: str) -> str:
    return f".preflight-{token}"


def _not_writable(folder: pathlib.Path, error: OSError) -> str:
    return f"{folder} cannot be written: {(error.strerror or str(error)).lower()}"


def devices() -> dict[str, str]:
    """Return how many devices this process has, and of which kind; this starts them."""
    local = jax.local_devices()
    kinds = sorted({f"{d.device_kind} ({d.platform})" for d in local})
    return {"devices of a process": str(len(local)), "kind of device": " and ".join(kinds)}


def free_bytes() -> dict[str, int]:
    """Return what each local device may still allocate, by its number; nothing where unknown."""
    found = {}
    for device in jax.local_devices():
        stats = device.memory_stats() or {}
        if "bytes_limit" in stats:
            found[str(device.id)] = int(stats["bytes_limit"]) - int(stats.get("bytes_in_use", 0))
    return found


def used_gpus() -> dict[str, int]:
    """Return the bytes that are in use on each GPU that nvidia-smi shows here, by its UUID.

    Before any process has started its devices, so they are somebody else's.
    """
    query = ["nvidia-smi", "--query-gpu=uuid,memory.used", "--format=csv,noheader,nounits"]
    try:
        told = subprocess.run(query, capture_output=True, text=True, check=True, timeout=20).stdout
    except (OSError, subprocess.SubprocessError):
        return {}
    return parse_used_gpus(told)


def parse_used_gpus(told: str) -> dict[str, int]:
    """Return bytes by UUID from lines `UUID, MiB`; lines without a number are left out."""
    pairs = [line.split(",") for line in told.splitlines() if line.count(",") == 1]
    return {u.strip(): int(mib) << 20 for u, mib in pairs if mib.strip().isdecimal()}


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:12]
