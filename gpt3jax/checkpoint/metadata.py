"""What a checkpoint says of itself besides its arrays. Imports no JAX."""

import dataclasses
import importlib.metadata
import json
import zlib
from collections.abc import Sequence
from typing import Any

from gpt3jax import errors


class DamagedError(errors.UserError):
    """A checkpoint that is there but cannot be read, or reads as something else."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta:
    """What a checkpoint says besides the state."""

    step: int
    consumed_samples: int
    data_order: dict[str, Any]
    config: dict[str, Any]
    only_params: bool = False
    """There is no more state than the parameters: a run starts with them, not from there."""
    faults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """What `faults.Faults` goes on from."""
    history: Sequence[dict[str, Any]] = ()
    """What starts of the run changed before, as in config.json (`resuming.entry`)."""
    mesh: str = ""
    """The mesh that it was written on, in words."""
    jax_version: str = ""
    version: str = importlib.metadata.version("gpt3jax")


def checked_meta(found: dict[str, Any]) -> Meta:
    """Return what the JSON of a checkpoint's meta file says.

    Raises:
        ValueError: it is not as it was written.
    """
    if with_digest(found)["crc32"] != found["crc32"]:
        raise ValueError("its meta file was changed since it was written")
    known = {field.name for field in dataclasses.fields(Meta)}
    return Meta(**{name: value for name, value in found.items() if name in known})


def with_digest(meta: dict[str, Any]) -> dict[str, Any]:
    """Return the meta data with a checksum of its own text."""
    content = {name: value for name, value in meta.items() if name != "crc32"}
    text = json.dumps(content, sort_keys=True)
    return content | {"crc32": zlib.crc32(text.encode())}
