"""Which checkpoints of a folder stay when a new one is written; Orbax asks, and deletes the others.

What was kept for good once stays, whatever a later start is told: each checkpoint has the config
that it was written with, and a mark where a later start decided it.
"""

import contextlib
import json
import pathlib
from collections.abc import Iterable, Sequence
from typing import Any

_MARK = pathlib.Path("meta", "kept")


class Keep:
    """The newest ones, and those that are kept for good; a preservation policy of Orbax."""

    def __init__(self, folder: pathlib.Path, n_newest: int | None, period: int) -> None:
        """Keep so many of a folder (None: all), and the multiples of a period (0: none)."""
        self._folder, self._n_newest, self._period = folder, n_newest, period
        self._stored: dict[int, bool] = {}

    def mark(self, steps: Iterable[int]) -> None:
        """Mark those of an earlier start that this one's period keeps."""
        for step in steps:
            if self._is_multiple(step):
                with contextlib.suppress(OSError):  # a damaged one
                    (self._folder / str(step) / _MARK).touch()

    def should_preserve(self, checkpoints: Sequence[Any], *, context: Any) -> list[bool]:
        """Tell of each checkpoint, oldest first, whether it stays."""
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
    """Tell whether a checkpoint is to be kept for good, by what is stored in it.

    One of parameters alone is: no run wrote it. So is one that cannot be read.
    """
    if (path / _MARK).exists():
        return True
    try:
        meta = json.loads((path / "meta" / "metadata").read_text())
        period = meta["config"].get("checkpoint.keep_period", 0)  # earlier versions had none
        return bool(meta["only_params"] or (period and meta["step"] % period == 0))
    except (OSError, ValueError, KeyError, TypeError):
        return True
