"""Which share of a run's time, over all its starts, went into steps that count, and where the rest.

`goodput.json` in log.dir has an entry for each start of the run: where it began, how far it came,
on which layout, and the seconds that its first process spent in each phase. The entry of a killed
start ends up to 10 s before the kill. Steps that a later start takes again are lost; their time is
estimated from their number. Time between starts is counted apart, since nobody need pay a machine
for it.
"""

import dataclasses
import itertools
import json
import math
import pathlib
import time

from gpt3jax.record import console_line, json_files
from gpt3jax.watch import phases

_WRITE_SECONDS = 10.0  # between writes of the file
PARTS = {
    "steps": "Steps that count, without waiting for data.",
    "lost steps": "Steps that a later start took again (estimated from their number).",
    **{p: text for p, text in phases.MEANINGS.items() if p not in (phases.HOST, phases.DEVICE)},
    "between starts": "Time between starts, which is no part of the run's time.",
}
"""What the time of a run goes into, over all its starts (seconds)."""
TAGS = {
    "goodput": "Share of the run's time that went into steps that count (0 to 1).",
    **{f"seconds/{part}": text for part, text in PARTS.items()},
}
"""What TensorBoard shows of it."""


@dataclasses.dataclass
class Start:
    """One start of a run, as goodput.json has it."""

    began: float
    """When the process began (Unix time)."""
    first_step: int
    """Steps that the run had taken before this start."""
    step: int
    """Steps that the run had taken when the entry was written."""
    seconds: dict[str, float]
    """Time in each phase (seconds)."""
    end: str = ""
    """How the start ended: "complete", "stopped" or "refused"; empty if it was killed, failed, or
    still runs."""
    layout: dict[str, str] = dataclasses.field(default_factory=dict)
    """The mesh, the devices and the version of JAX, in words; empty in older files."""

    @property
    def total(self) -> float:
        """Return how long the start ran, as far as it is known (seconds)."""
        return math.fsum(self.seconds.values())


def lost_steps(starts: list[Start]) -> list[int]:
    """Return how many steps of each start a later start took again."""
    lost, first_retaken = [], math.inf  # later starts took the steps after this one again
    for start in reversed(starts):
        lost.append(int(max(0, start.step - max(first_retaken, start.first_step))))
        first_retaken = min(first_retaken, start.first_step)
    return lost[::-1]


def spent(starts: list[Start]) -> list[dict[str, float]]:
    """Return the seconds of each start by what they went into.

    "steps" are the steps that count; a later start took "lost steps" again.
    """
    parts = []
    for start, n_lost in zip(starts, lost_steps(starts), strict=True):
        on_steps = phases.step_seconds(start.seconds) - start.seconds.get(phases.DATA, 0.0)
        n_steps = start.step - start.first_step
        lost = on_steps * n_lost / n_steps if n_steps else 0.0
        others = {
            phase: seconds
            for phase, seconds in start.seconds.items()
            if phase not in (phases.HOST, phases.DEVICE)
        }
        parts.append({"steps": on_steps - lost, "lost steps": lost} | others)
    return parts


def shares(starts: list[Start]) -> dict[str, float]:
    """Return the seconds of a run by what they went into, as `spent`; "between starts" is last."""
    totals = {"steps": 0.0, "lost steps": 0.0}
    for part in spent(starts):
        for kind, seconds in part.items():
            totals[kind] = totals.get(kind, 0.0) + seconds
    pairs = itertools.pairwise(starts)
    between = math.fsum(max(0.0, b.began - a.began - a.total) for a, b in pairs)
    return totals | {"between starts": between}


def n_fruitless(starts: list[Start], first_step: int) -> int:
    """Return how many starts in a row, up to now, were killed or failed and saved nothing."""
    n = 0
    for start in reversed(starts):
        if start.end or start.first_step != first_step:
            break
        n += 1
    return n


class Account:
    """The account of a run's time, kept by its first process."""

    def __init__(
        self, log_dir: str, clock: phases.Phases, first_step: int, layout: dict[str, str]
    ) -> None:
        """Add a start to the account of a folder; without a folder nothing is kept.

        All methods raise UserError, which names log.dir, where it cannot be written.
        """
        self._log_dir = log_dir
        self._clock, self._written = clock, -math.inf
        self._path = pathlib.Path(self._log_dir) / "goodput.json"
        self._starts = read(self._path) if self._log_dir else []
        self.n_fruitless = n_fruitless(self._starts, first_step)
        began = time.time() - math.fsum(clock.seconds().values())
        self._starts.append(Start(began, first_step, first_step, {}, layout=layout))
        self._write()

    def update(self, step: int) -> None:
        """Note how far the run is; write the file now and then."""
        self._starts[-1].step = step
        if time.monotonic() - self._written > _WRITE_SECONDS:
            self._write()

    def close(self, end: str) -> None:
        """Note how the start ended, in the words of `Start.end`."""
        self._starts[-1].end = end
        self._write()

    def scalars(self) -> dict[str, float]:
        """Return what to plot: goodput (the share of steps that count in all time), and seconds."""
        totals, total, between = self._totals()
        tags = {f"seconds/{name}": seconds for name, seconds in totals.items()}
        return {"goodput": totals["steps"] / total, **tags, "seconds/between starts": between}

    def summary(self) -> str:
        """Return the line that ends a run's log."""
        totals, total, between = self._totals()
        largest_first = sorted(totals.items(), key=lambda item: -item[1])
        parts = [f"{name} {s / total:.1%}" for name, s in largest_first if s > 5e-4 * total]
        n = len(self._starts)
        line = f"time: {console_line.duration(total)} in {n} start{'s' if n > 1 else ''}: "
        line += ", ".join(parts)
        return line + (f"; {console_line.duration(between)} between starts" if between >= 1 else "")

    def _totals(self) -> tuple[dict[str, float], float, float]:
        """Return the seconds of all starts by what they went into, their sum, and between them."""
        self._starts[-1].seconds = self._clock.seconds()
        totals = shares(self._starts)
        between = totals.pop("between starts")
        return totals, math.fsum(totals.values()), between

    def _write(self) -> None:
        self._starts[-1].seconds = self._clock.seconds()
        self._written = time.monotonic()
        if self._log_dir:
            rows = [dataclasses.asdict(start) for start in self._starts]
            with json_files.user_errors(self._log_dir):
                self._path.parent.mkdir(parents=True, exist_ok=True)
                json_files.replace_file(self._path, json.dumps({"starts": rows}, indent=1) + "\n")


def read(path: pathlib.Path) -> list[Start]:
    """Return the starts that a file has; none where it cannot be read."""
    try:
        return [Start(**row) for row in json.loads(path.read_text())["starts"]]
    except (OSError, ValueError, KeyError, TypeError):
        return []
