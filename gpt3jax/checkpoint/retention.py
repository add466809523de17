"""Which checkpoints of a folder stay when a new one is written; Orbax asks, and deletes the others.

A checkpoint that was once kept for good stays, whatever the options of a later start: each one has
the config that it was written with, and a mark where a later start decided to keep it.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Protocol

_MARK = pathlib.Path("meta", "kept")


class _Checkpoint(Protocol):
    """What Orbax says of a checkpoint."""

    @property
    def step(self) -> int: ...


class Keep:
    """The newest checkpoints, and those that are kept for good; a preservation policy of Orbax."""

    def __init__(self, folder: pathlib.Path, n_newest: int | None, period: int) -> None:
        """Keep the newest of a folder (None: all), and the multiples of a period (0: none)."""
        self._folder, self._n_newest, self._period = folder, n_newest, period
        self._stored: dict[int, bool] = {}

    def mark(self, steps: Iterable[int]) -> None:
        """Mark the checkpoints of earlier starts that this one's period keeps."""
        for step in steps:
            if self._is_multiple(step):
                with contextlib.suppress(OSError):  # a damaged one
                    (self._folder / str(step) / _MARK).touch()

    def should_preserve(self, checkpoints: Sequence[_Checkpoint], *, context: object) -> list[bool]:
        """Return for each checkpoint, oldest first, whether it stays."""
        n_newest = len(checkpoints) if self._n_newest is None else self._n_newest
        first_new = len(checkpoints) - n_newest
        return [i >= first_new or self._for_good(info.step) for i, info in enumerate(checkpoints)]

    def _for_good(self, step: int) -> bool:
        if step not in self._stored:
            self._stored[step] = is_kept(self._folder / str(step))
        return self._is_multiple(step) or self._stored[step]

    def _is_multiple(self, step: int) -> bool:
        return self._period > 0 and step % self._period == 0


def is_kept(path: pathlib.Path) -> bool:
    """Return whether a checkpoint is to be kept for good, by what is stored in it.

    A checkpoint of parameters alone is kept, as no run wrote it; so is one that cannot be read.
    """
    if (path / _MARK).exists():
        return True
    try:
        meta = json.loads((path / "meta" / "metadata").read_text())
        period = meta["config"].get("checkpoint.keep_period", 0)  # earlier versions had none
        return bool(meta["only_params"] or (period and meta["step"] % period == 0))
    except (OSError, ValueError, KeyError, TypeError):
        return True
