"""What follows from what the processes told: checks, each with the processes at fault. Pure."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gpt3jax import errors
from gpt3jax.preflight import facts

Status = Literal["ok", "warn", "retry", "fail"]
MAX_SKEW = 1.0  # seconds: logs and TensorBoard of several hosts stay in order
SLOW = 0.8  # of the median: what a machine reaches below it is named
_SHOWN = 8  # lines of a check in an error of one line
# Of the variables of the environment only these change the program.
_DECISIVE = ("XLA_", "JAX_", "TF_XLA_")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A finding, and the processes that it is about."""

    text: str
    processes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """The result of a check; retry is a failure that may be gone at the next start."""

    name: str
    status: Status
    told: str
    lines: tuple[Line, ...] = ()


Told = Sequence[Mapping[str, str] | None]  # by process; None: it did not answer


def to_json(checks: Sequence[Check]) -> list[dict[str, Any]]:
    """Return checks as plain data."""
    return [dataclasses.asdict(check) for check in checks]


def from_json(data: list[dict[str, Any]]) -> list[Check]:
    """Return what `to_json` gave."""
    return [
        Check(
            name=one["name"], status=one["status"], told=one["told"],
            lines=tuple(
                Line(text=line["text"], processes=tuple(line["processes"])) for line in one["lines"]
            ),
        )
        for one in data
    ]  # fmt: skip


def answers(hosts: Sequence[str], told: Sequence[Any]) -> Check:
    """Check that every process answered."""
    silent = [i for i, one in enumerate(told) if one is None]
    if not silent:
        n_hosts = len(set(hosts))
        return _ok("processes", f"{len(told)} on {n_hosts} host{'s' * (n_hosts > 1)}")
    line = Line(text=f"no answer from {named(silent, hosts)}", processes=tuple(silent))
    return Check(
        name="processes", status="retry", told=f"{len(silent)} of {len(told)} are silent",
        lines=(line,),
    )  # fmt: skip


def same(name: str, hosts: Sequence[str], told: Told, status: Status, what: str) -> Check:
    """Check that all processes told the same; those that differ from most are named with it.

    Where as many say one thing as another, the first process is right.
    """
    lines = differences(hosts, told)
    if lines:
        n = len({i for line in lines for i in line.processes})
        return Check(name=name, status=status, told=f"not the same on {n} of {len(told)} processes",
                     lines=tuple(lines))  # fmt: skip
    n_keys = len(next((one for one in told if one is not None), {}))
    return _ok(name, what.format(n=n_keys))


def differences(hosts: Sequence[str], told: Told) -> list[Line]:
    """Return a line for each value that is not that of most processes."""
    present = [i for i, one in enumerate(told) if one is not None]
    keys = dict.fromkeys(key for one in told if one is not None for key in one)
    lines = []
    for key in keys:
        values = {i: (told[i] or {}).get(key, "(absent)") for i in present}
        usual = collections.Counter(values.values()).most_common(1)[0][0]  # the earliest of equals
        groups: dict[str, list[int]] = {}
        for i, value in values.items():
            if value != usual:
                groups.setdefault(value, []).append(i)
        for value, processes in groups.items():
            place = named(processes, hosts)
            text = f"{key}={value} on {place}, {usual} on the others"
            lines.append(Line(text=text, processes=tuple(processes)))
    return lines


def environment(hosts: Sequence[str], told: Told) -> Check:
    """Check the variables of the environment: what changes the program must be the same."""
    found = same("environment", hosts, told, "warn", "{n} variables of XLA, JAX and NCCL")
    decisive = any(line.text.startswith(_DECISIVE) for line in found.lines)
    return dataclasses.replace(found, status="fail") if decisive else found


def corpus(hosts: Sequence[str], told: Told) -> Check:
    """Check that every process can read the corpus's files, and that they are the same."""
    lines = []
    for i, one in enumerate(told):
        for file, value in (one or {}).items():
            if value.startswith(facts.ERROR):
                lines.append((f"{file}: {value.removeprefix(facts.ERROR)}", i))
    if lines:
        found = _by_text(lines, hosts)
        return Check(name="corpus", status="fail", told="cannot be read", lines=found)
    files = sum(len(one) for one in told if one is not None)
    if not files:
        return _ok("corpus", "nothing to compare: mock, or made at the first start")
    return same("corpus", hosts, told, "fail", "{n} files, by size and samples of their bytes")


def folders(hosts: Sequence[str], told: Told, n_folders: int) -> Check:
    """Check the folders of checkpoints and logs, where each process said what is wrong there."""
    status: Status = "ok"
    lines = []
    for i, one in enumerate(told):
        for name, wrong in (one or {}).items():
            fails = facts.FOLDERS[name] == "fail" or "cannot be written" in wrong
            status = "fail" if fails else ("warn" if status == "ok" else status)
            lines.append((f"{name}: {wrong}", i))
    if not lines:
        return _ok(
            "folders", f"{n_folders} writable and seen by all" if n_folders else "none given"
        )
    return Check(name="folders", status=status, told="not writable or not shared",
                 lines=_by_text(lines, hosts))  # fmt: skip


def clocks(hosts: Sequence[str], offsets: Sequence[tuple[float, float] | None]) -> Check:
    """Check the clocks: (seconds before the first process's, uncertainty) of each process."""
    known = [one for one in offsets if one is not None]
    lines = [
        Line(text=f"{named([i], hosts)} is {skew(*one)}", processes=(i,))
        for i, one in enumerate(offsets)
        if one is not None and abs(one[0]) - one[1] > MAX_SKEW
    ]
    largest = max(known, key=lambda one: abs(one[0]))
    told = f"largest difference {abs(largest[0]):.3f} s (+- {largest[1]:.3f})"
    return Check(name="clocks", status="warn" if lines else "ok", told=told, lines=tuple(lines))


def skew(offset: float, uncertainty: float) -> str:
    """Return a difference of clocks in words."""
    way = "ahead of" if offset > 0 else "behind"
    return f"{abs(offset):.3f} s (+- {uncertainty:.3f}) {way} process 0"


def devices(hosts: Sequence[str], told: Told) -> Check:
    """Check that each process has as many devices, of one kind."""
    found = same("devices", hosts, told, "retry", "")
    mixed = [i for i, one in enumerate(told) if one and " and " in one["kind of device"]]
    if mixed:
        line = Line(text=f"several kinds on {named(mixed, hosts)}", processes=tuple(mixed))
        found = dataclasses.replace(found, lines=(*found.lines, line), told="not of one kind")
    if found.lines:
        kinds = any("kind" in line.text for line in found.lines)
        return dataclasses.replace(found, status="fail" if kinds else "retry")
    first = next(one for one in told if one is not None)
    return _ok("devices", f"{first['devices of a process']} a process, {first['kind of device']}")


def memory(
    hosts: Sequence[str],
    free: Sequence[Mapping[str, int] | None],
    used: Sequence[Mapping[str, int] | None],
    needed: float,
) -> Check:
    """Check free bytes of each device against what a step needs, and GPUs in others' use."""
    lines, known = [], []
    for i, one in enumerate(free):
        for device, n_bytes in (one or {}).items():
            known.append(n_bytes)
            if n_bytes < needed:
                text = f"device {device} of {named([i], hosts)} has {gib(n_bytes)} GiB free"
                lines.append(Line(text=text, processes=(i,)))
    busy: dict[str, Line] = {}
    for i, one in enumerate(used):
        for uuid, n_bytes in (one or {}).items():
            if n_bytes > 1 << 30 and uuid not in busy:
                text = f"{uuid} on {hosts[i]}: {gib(n_bytes)} GiB were in use before this run"
                busy[uuid] = Line(text=text, processes=(i,))
    lines += busy.values()
    told = f"a step needs {gib(needed)} GiB a device (closed forms)"
    told += f", {gib(min(known))} are free" if known else "; this kind does not tell what is free"
    return Check(name="memory", status="warn" if lines else "ok", told=told, lines=tuple(lines))


def gib(n_bytes: float) -> str:
    """Return bytes in GiB."""
    return f"{n_bytes / 2**30:.2f}"


def outliers(values: Sequence[float], share: float = SLOW) -> list[int]:
    """Return which values are below this share of the median (of two: of the larger)."""
    limit = share * statistics.median_high(values) if values else 0.0
    return [i for i, value in enumerate(values) if value < limit]


def speed(name: str, unit: str, rates: Sequence[tuple[int, str, float]]) -> Check:
    """Check rates, each of a process and a named part of it: slow ones are named."""
    values = [rate for _, _, rate in rates]
    median = statistics.median_high(values)
    lines = tuple(
        Line(
            text=f"{rates[k][1]}: {values[k]:.3g} {unit}, {values[k] / median:.0%} of the median",
            processes=(rates[k][0],),
        )
        for k in outliers(values)
    )
    told = f"median {median:.3g} {unit}, slowest {min(values):.3g}, of {len(values)}"
    return Check(name=name, status="warn" if lines else "ok", told=told, lines=lines)


def named(processes: Sequence[int], hosts: Sequence[str]) -> str:
    """Return processes in words with their hosts, runs of numbers as ranges."""
    runs: list[list[int]] = []
    for i in processes:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    told = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    of = list(dict.fromkeys(hosts[i] for i in processes))
    shown = ", ".join(of[:4]) + (f", {len(of) - 4} more" if len(of) > 4 else "")
    return f"process{'es' * (len(processes) > 1)} {told} ({shown})"


def refuse(checks: Sequence[Check], process: int) -> None:
    """Raise an error of one line if a check failed; each process hears of what concerns it.

    Raises:
        UserError: it would fail again.
        TransientError: it may not fail again.
    """
    failed = [check for check in checks if check.status in ("fail", "retry")]
    if not failed:
        return
    lines = [
        f"{check.name}: {line.text}"
        for check in failed
        for line in check.lines or (Line(text=check.told),)
        if process == 0 or process in line.processes
    ]
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    names = ", ".join(check.name for check in failed)
    if not lines:
        lines = [f"{names}: another process was refused: see process 0's output"]
    told = "; ".join(lines[:_SHOWN]) + more
    lasting = any(check.status == "fail" for check in failed)
    kind = errors.UserError if lasting else errors.TransientError
    raise kind(f"preflight: {told}. See docs/preflight.md")


def _by_text(lines: list[tuple[str, int]], hosts: Sequence[str]) -> tuple[Line, ...]:
    """Return a line for each text, with all the processes that it came from."""
    groups: dict[str, list[int]] = {}
    for text, i in lines:
        groups.setdefault(text, []).append(i)
    return tuple(
        Line(text=f"{text} on {named(of, hosts)}", processes=tuple(of))
        for text, of in groups.items()
    )


def _ok(name: str, told: str) -> Check:
    return Check(name=name, status="ok", told=told)
