"""What a checkpoint says of itself besides its arrays, as JSON. Imports no JAX."""

import dataclasses
import importlib.metadata
import json
import pathlib
import zlib
from collections.abc import Mapping, Sequence
from typing import Any

from gpt3jax import errors
from gpt3jax.checkpoint import sample_order


class DamagedError(errors.UserError):
    """A checkpoint that is there but cannot be read, or reads as something else."""

    def __init__(self, message: str, *, page: str = "checkpoints.md#damage") -> None:
        super().__init__(message, page=page)


class ChangedError(DamagedError):
    """A checkpoint whose arrays do not match their digests."""

    def __init__(self, path: pathlib.Path, arrays: list[str]):
        super().__init__(
            f"checkpoint {path} was changed since it was written: {', '.join(arrays)} "
            "do not match their digests"
        )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Meta:
    """What a checkpoint says besides the state."""

    step: int
    consumed_samples: int
    data_order: dict[str, object]
    """What decides the order of samples, by the keys of `sample_order`."""
    config: dict[str, Any]  # fields of several types
    only_params: bool = False
    """The checkpoint has parameters alone: a run starts with them at step 0."""
    faults: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The state of `numerical_faults.Faults`, which a resumed run continues."""
    history: Sequence[dict[str, Any]] = ()
    """What earlier starts of the run changed, as in config.json (`resume.history_entry`)."""
    layout: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The layout that the state was written in (`config.layout`); earlier versions: in `config`."""
    layouts: dict[str, Any] = dataclasses.field(default_factory=dict)
    """The layouts of all batch sizes (`plan.ranking`), which a resumed run keeps."""
    dropout_generator: str = "Threefry for each value"
    """What drew dropout's masks; earlier versions, which wrote no name, had this one."""
    mesh: str = ""
    """The mesh of the run that wrote it, in words."""
    jax_version: str = ""
    version: str = importlib.metadata.version("gpt3jax")

    @property
    def config_as_laid_out(self) -> dict[str, Any]:
        """The config with the layout's fields in the place of `auto`."""
        return self.config | self.layout


def read(path: pathlib.Path) -> Meta:
    """Return the content of the meta file of a checkpoint's folder.

    Raises:
        OSError, ValueError, TypeError, KeyError: it is missing, cut or changed.
    """
    return checked_meta(json.loads((path / "meta" / "metadata").read_text()))


def checked_meta(stored: dict[str, Any]) -> Meta:
    """Return the content of a checkpoint's meta file, written by this version or an earlier one.

    Raises:
        ValueError: it was changed since it was written.
    """
    if with_checksum(stored)["crc32"] != stored["crc32"]:
        raise ValueError("its meta file was changed since it was written")
    fields = {field.name for field in dataclasses.fields(Meta)}
    known = {name: value for name, value in stored.items() if name in fields}
    return Meta(**known | {"data_order": sample_order.with_keys(known["data_order"])})


def with_checksum(meta: Mapping[str, object]) -> dict[str, object]:
    """Return the content of a meta file with a checksum of its own text."""
    content = {name: value for name, value in meta.items() if name != "crc32"}
    text = json.dumps(content, sort_keys=True)
    return content | {"crc32": zlib.crc32(text.encode())}
