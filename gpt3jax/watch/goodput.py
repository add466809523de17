"""What share of a run's time went into steps that count, and where the rest went, over all starts.

`goodput.json` in log.dir has an entry for each start of the run: where it began, how far it came,
the seconds that its first process spent in each phase. A killed start is known up to its last
entry, some 10 s before. Steps that a later start takes again were lost: their share of the time is
that of their number. Time between starts is told apart, since no machine need be paid for it.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import time
from typing import Any

from gpt3jax.record import metrics
from gpt3jax.watch import phases

_EVERY = 10.0  # seconds between entries


@dataclasses.dataclass
class Start:
    """One start of a run, as in goodput.json."""

    began: float
    """When the process began (Unix time)."""
    first_step: int
    """Steps taken before it."""
    step: int
    """Steps taken at its last entry."""
    seconds: dict[str, float]
    """Time in each phase."""
    end: str = ""
    """How it ended: "complete", "stopped", "refused"; empty if it was killed or failed, or runs."""

    @property
    def total(self) -> float:
        """Return how long it is known to have run (seconds)."""
        return math.fsum(self.seconds.values())


def shares(starts: list[Start]) -> dict[str, float]:
    """Return the seconds of a run by what they went into; "between starts" comes last.

    "steps" are those that count; "lost steps" were taken again by a later start.
    """
    found = {"steps": 0.0, "lost steps": 0.0}
    kept = math.inf
    for start in reversed(starts):
        took = phases.step_seconds(start.seconds) - start.seconds.get(phases.DATA, 0.0)
        n_steps = start.step - start.first_step
        n_lost = max(0.0, start.step - max(kept, start.first_step))
        lost = took * n_lost / n_steps if n_steps else 0.0
        found["lost steps"] += lost
        found["steps"] += took - lost
        kept = min(kept, start.first_step)
        for phase, seconds in start.seconds.items():
            if phase not in (phases.HOST, phases.DEVICE):
                found[phase] = found.get(phase, 0.0) + seconds
    pairs = itertools.pairwise(starts)
    between = math.fsum(max(0.0, b.began - a.began - a.total) for a, b in pairs)
    return found | {"between starts": between}


def n_fruitless(starts: list[Start], first_step: int) -> int:
    """Return how many starts in a row were killed or failed and saved nothing, up to now."""
    n = 0
    for start in reversed(starts):
        if start.end or start.first_step != first_step:
            break
        n += 1
    return n


class Account:
    """The account of a run's time, kept by its first process."""

    def __init__(self, log_dir: str, clock: phases.Phases, first_step: int) -> None:
        """Add a start to the account of a folder; without a folder nothing is kept.

        All methods raise UserError, naming log.dir, where it cannot be written.
        """
        self._log_dir = log_dir
        self._clock, self._written = clock, -math.inf
        self._path = pathlib.Path(self._log_dir) / "goodput.json"
        self._starts = _read(self._path) if self._log_dir else []
        self.n_fruitless = n_fruitless(self._starts, first_step)
        began = time.time() - math.fsum(clock.seconds().values())
        self._starts.append(Start(began, first_step, first_step, {}))
        self._write()

    def update(self, step: int) -> None:
        """Note how far the run is; the file is written now and then."""
        self._starts[-1].step = step
        if time.monotonic() - self._written > _EVERY:
            self._write()

    def close(self, end: str) -> None:
        """Note how the start ended: as `Start.end` says."""
        self._starts[-1].end = end
        self._write()

    def scalars(self) -> dict[str, float]:
        """Return what to plot: goodput (the share of steps that count in all time), and seconds."""
        found = self._shares()
        between = found.pop("between starts")
        total = math.fsum(found.values())
        tags = {f"seconds/{name}": seconds for name, seconds in found.items()}
        return {"goodput": found["steps"] / total, **tags, "seconds/between starts": between}

    def summary(self) -> str:
        """Return the line that ends a run's log."""
        found = self._shares()
        between = found.pop("between starts")
        total = math.fsum(found.values())
        parts = sorted(found.items(), key=lambda item: -item[1])
        told = ", ".join(f"{name} {s / total:.1%}" for name, s in parts if s > 5e-4 * total)
        n = len(self._starts)
        line = f"time: {metrics.duration(total)} in {n} start{'s' if n > 1 else ''}: {told}"
        return line + (f"; {metrics.duration(between)} between starts" if n > 1 else "")

    def _shares(self) -> dict[str, float]:
        self._starts[-1].seconds = self._clock.seconds()
        return shares(self._starts)

    def _write(self) -> None:
        self._starts[-1].seconds = self._clock.seconds()
        self._written = time.monotonic()
        if self._log_dir:
            rows = [dataclasses.asdict(start) for start in self._starts]
            with metrics.blaming(self._log_dir):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                metrics.replace_file(self._path, json.dumps({"starts": rows}, indent=1) + "\n")


def _read(path: pathlib.Path) -> list[Start]:
    """Return the starts before this one; an account that cannot be read begins anew."""
    try:
        rows: list[dict[str, Any]] = json.loads(path.read_text())["starts"]
        return [Start(**row) for row in rows]
    except (OSError, ValueError, KeyError, TypeError):
        return []
