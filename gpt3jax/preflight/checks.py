"""The checks: each compares the answers of all processes and names those at fault."""

import collections
import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from gpt3jax import errors
from gpt3jax.preflight import process_facts

Status = Literal["ok", "warn", "retry", "fail"]
MAX_SKEW = 1.0  # seconds; below it logs and TensorBoard of several hosts stay in order
SLOW = 0.8  # of the median; slower devices are named
_SHOWN = 8  # lines of the checks in an error of one line
_DECISIVE = ("XLA_", "JAX_", "TF_XLA_")  # environment variables that change the program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Line:
    """A finding, and the processes that it is about."""

    text: str
    processes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True, kw_only=True)
class Check:
    """The result of a check; retry: it failed, and a new start may cure it."""

    name: str
    status: Status
    result: str
    lines: tuple[Line, ...] = ()


Answers = Sequence[Mapping[str, str] | None]  # by process; None: it did not answer


def to_json(checks: Sequence[Check]) -> list[dict[str, object]]:
    """Return checks as plain data."""
    return [
        {
            "name": check.name, "status": check.status, "told": check.result,
            "lines": [dataclasses.asdict(line) for line in check.lines],
        }
        for check in checks
    ]  # fmt: skip


def from_json(data: list[dict[str, Any]]) -> list[Check]:
    """Return the checks from `to_json`, after JSON."""
    return [
        Check(
            name=check["name"], status=check["status"], result=check["told"],
            lines=tuple(
                Line(text=line["text"], processes=tuple(line["processes"]))
                for line in check["lines"]
            ),
        )
        for check in data
    ]  # fmt: skip


def all_answered(hosts: Sequence[str], answers: Sequence[object]) -> Check:
    """Check that every process answered."""
    silent = [i for i, answer in enumerate(answers) if answer is None]
    if not silent:
        n_hosts = len(set(hosts))
        return _ok("processes", f"{len(answers)} on {n_hosts} host{'s' * (n_hosts > 1)}")
    line = Line(text=f"no answer from {named(silent, hosts)}", processes=tuple(silent))
    return Check(
        name="processes", status="retry", result=f"{len(silent)} of {len(answers)} are silent",
        lines=(line,),
    )  # fmt: skip


def same(name: str, hosts: Sequence[str], answers: Answers, status: Status, result: str) -> Check:
    """Check that all processes gave the same values; name those that differ from the majority.

    In a tie the earliest process is right. `result` describes success; its {n} becomes the number
    of values.
    """
    lines = differences(hosts, answers)
    if lines:
        n = len({i for line in lines for i in line.processes})
        return Check(
            name=name, status=status, result=f"not the same on {n} of {len(answers)} processes",
            lines=tuple(lines),
        )  # fmt: skip
    n_keys = len(next((answer for answer in answers if answer is not None), {}))
    return _ok(name, result.format(n=n_keys))


def differences(hosts: Sequence[str], answers: Answers) -> list[Line]:
    """Return a line for each value that differs from that of the majority."""
    present = [i for i, answer in enumerate(answers) if answer is not None]
    keys = dict.fromkeys(key for answer in answers if answer is not None for key in answer)
    lines = []
    for key in keys:
        values = {i: (answers[i] or {}).get(key, "(absent)") for i in present}
        usual = collections.Counter(values.values()).most_common(1)[0][0]  # in a tie the earliest
        groups: dict[str, list[int]] = {}
        for i, value in values.items():
            if value != usual:
                groups.setdefault(value, []).append(i)
        for value, processes in groups.items():
            place = named(processes, hosts)
            text = f"{key}={value} on {place}, {usual} on the others"
            lines.append(Line(text=text, processes=tuple(processes)))
    return lines


def environment(hosts: Sequence[str], answers: Answers) -> Check:
    """Check the environment variables; a difference fails only if it changes the program."""
    check = same("environment", hosts, answers, "warn", "{n} variables of XLA, JAX, NCCL and CUDA")
    decisive = any(line.text.startswith(_DECISIVE) for line in check.lines)
    return dataclasses.replace(check, status="fail") if decisive else check


def corpus(hosts: Sequence[str], answers: Answers) -> Check:
    """Check that every process can read the files of the corpus, and that they are the same."""
    unreadable = [
        (f"{file}: {value.removeprefix(process_facts.ERROR)}", i)
        for i, answer in enumerate(answers)
        for file, value in (answer or {}).items()
        if value.startswith(process_facts.ERROR)
    ]
    if unreadable:
        lines = _by_text(unreadable, hosts)
        return Check(name="corpus", status="fail", result="cannot be read", lines=lines)
    if not any(answers):
        return _ok("corpus", "nothing to compare: mock, or made at the first start")
    return same("corpus", hosts, answers, "fail", "{n} files, by size and samples of their bytes")


def folders(hosts: Sequence[str], answers: Answers, n_folders: int) -> Check:
    """Check the folders of checkpoints and logs; an answer has the problem of each folder."""
    status: Status = "ok"
    lines = []
    for i, answer in enumerate(answers):
        for name, problem in (answer or {}).items():
            fails = process_facts.FOLDERS[name] == "fail" or "cannot be written" in problem
            status = "fail" if fails else ("warn" if status == "ok" else status)
            lines.append((f"{name}: {problem}", i))
    if not lines:
        return _ok(
            "folders", f"{n_folders} writable and seen by all" if n_folders else "none given"
        )
    return Check(
        name="folders", status=status, result="not writable or not shared",
        lines=_by_text(lines, hosts),
    )  # fmt: skip


def clocks(hosts: Sequence[str], offsets: Sequence[tuple[float, float] | None]) -> Check:
    """Check the clocks, given (seconds ahead of process 0, uncertainty) of each process."""
    known = [offset for offset in offsets if offset is not None]
    lines = [
        Line(text=f"{named([i], hosts)} is {skew(*offset)}", processes=(i,))
        for i, offset in enumerate(offsets)
        if offset is not None and abs(offset[0]) - offset[1] > MAX_SKEW
    ]
    largest = max(known, key=lambda offset: abs(offset[0]))
    result = f"largest difference {abs(largest[0]):.3f} s (+- {largest[1]:.3f})"
    return Check(name="clocks", status="warn" if lines else "ok", result=result, lines=tuple(lines))


def skew(offset: float, uncertainty: float) -> str:
    """Return a difference of clocks in words."""
    way = "ahead of" if offset > 0 else "behind"
    return f"{abs(offset):.3f} s (+- {uncertainty:.3f}) {way} process 0"


def devices(hosts: Sequence[str], answers: Answers) -> Check:
    """Check that all processes have the same number of devices, and all devices one kind."""
    check = same("devices", hosts, answers, "retry", "")
    mixed = [
        i for i, answer in enumerate(answers) if answer and " and " in answer[process_facts.KIND]
    ]
    if mixed:
        line = Line(text=f"several kinds on {named(mixed, hosts)}", processes=tuple(mixed))
        check = dataclasses.replace(check, lines=(*check.lines, line), result="not of one kind")
    if check.lines:
        kinds = any("kind" in line.text for line in check.lines)
        return dataclasses.replace(check, status="fail" if kinds else "retry")
    first = next(answer for answer in answers if answer is not None)
    return _ok(
        "devices", f"{first[process_facts.N_DEVICES]} a process, {first[process_facts.KIND]}"
    )


def memory(
    hosts: Sequence[str],
    free: Sequence[Mapping[str, int] | None],
    used: Sequence[Mapping[str, int] | None],
    needed: float,
) -> Check:
    """Check the free bytes of each device against what a step needs, and look for GPUs in use."""
    lines, known = [], []
    for i, answer in enumerate(free):
        for device, n_bytes in (answer or {}).items():
            known.append(n_bytes)
            if n_bytes < needed:
                text = f"device {device} of {named([i], hosts)} has {gib(n_bytes)} GiB free"
                lines.append(Line(text=text, processes=(i,)))
    busy: dict[str, Line] = {}
    for i, answer in enumerate(used):
        for uuid, n_bytes in (answer or {}).items():
            if n_bytes > 1 << 30 and uuid not in busy:
                text = f"{uuid} on {hosts[i]}: {gib(n_bytes)} GiB were in use before this run"
                busy[uuid] = Line(text=text, processes=(i,))
    lines += busy.values()
    result = f"a step needs {gib(needed)} GiB a device (closed forms)"
    result += f", {gib(min(known))} are free" if known else "; free memory of this kind is unknown"
    return Check(name="memory", status="warn" if lines else "ok", result=result, lines=tuple(lines))


def gib(n_bytes: float) -> str:
    """Return bytes in GiB."""
    return f"{n_bytes / 2**30:.2f}"


def outliers(values: Sequence[float], share: float = SLOW) -> list[int]:
    """Return the indices of values below this share of the median (of two: of the larger)."""
    limit = share * statistics.median_high(values) if values else 0.0
    return [i for i, value in enumerate(values) if value < limit]


def speed(name: str, unit: str, rates: Sequence[tuple[int, str, float]]) -> Check:
    """Check rates, each (process, name of the device or process, rate), for slow ones."""
    values = [rate for _, _, rate in rates]
    median = statistics.median_high(values)
    lines = tuple(
        Line(
            text=f"{rates[k][1]}: {values[k]:.3g} {unit}, {values[k] / median:.0%} of the median",
            processes=(rates[k][0],),
        )
        for k in outliers(values)
    )
    result = f"median {median:.3g} {unit}, slowest {min(values):.3g}, of {len(values)}"
    return Check(name=name, status="warn" if lines else "ok", result=result, lines=lines)


def named(processes: Sequence[int], hosts: Sequence[str]) -> str:
    """Return processes and their hosts as text, consecutive numbers as ranges."""
    runs: list[list[int]] = []
    for i in processes:
        if runs and runs[-1][-1] == i - 1:
            runs[-1].append(i)
        else:
            runs.append([i])
    numbers = ", ".join(f"{r[0]}-{r[-1]}" if len(r) > 1 else str(r[0]) for r in runs)
    names = list(dict.fromkeys(hosts[i] for i in processes))
    shown = ", ".join(names[:4]) + (f", {len(names) - 4} more" if len(names) > 4 else "")
    return f"process{'es' * (len(processes) > 1)} {numbers} ({shown})"


def refuse(checks: Sequence[Check], process: int) -> None:
    """Raise an error of one line if a check failed; process 0 shows all lines, others their own.

    Raises:
        UserError: a retry would fail again.
        TransientError: a retry may succeed.
    """
    failed = [check for check in checks if check.status in ("fail", "retry")]
    if not failed:
        return
    lines = [
        f"{check.name}: {line.text}"
        for check in failed
        for line in check.lines or (Line(text=check.result),)
        if process == 0 or process in line.processes
    ]
    more = f"; and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    names = ", ".join(check.name for check in failed)
    if not lines:
        lines = [f"{names}: another process was refused: see process 0's output"]
    text = "; ".join(lines[:_SHOWN]) + more
    lasting = any(check.status == "fail" for check in failed)
    kind = errors.UserError if lasting else errors.TransientError
    page = "preflight.md#what-is-checked-what-a-failure-means-what-to-do"
    raise kind(f"preflight: {text}", page=page)


def _by_text(lines: list[tuple[str, int]], hosts: Sequence[str]) -> tuple[Line, ...]:
    """Return a line for each text, with all its processes."""
    groups: dict[str, list[int]] = {}
    for text, i in lines:
        groups.setdefault(text, []).append(i)
    return tuple(
        Line(text=f"{text} on {named(processes, hosts)}", processes=tuple(processes))
        for text, processes in groups.items()
    )


def _ok(name: str, result: str) -> Check:
    return Check(name=name, status="ok", result=result)
