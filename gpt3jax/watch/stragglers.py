"""What the other processes of a run do: each posts its phase and times, the first two read them.

Posts go through JAX's coordination service and not through collectives, so they arrive while a
device hangs. Two processes read, because the second can still report when the first one, where the
service runs, does not answer. In a large run one process posts for all of its node.
"""

import collections
import json
import math
import socket
import statistics
import threading
import time
from collections.abc import Mapping
from typing import NamedTuple

from gpt3jax.distributed import messages, node_speaker
from gpt3jax.watch import phases

_READERS = 2
_SILENT_TIMES = 3  # so many intervals without a post; one more where a speaker passes it on
# A process is slow if it takes this share of a step longer than the median process ...
_SLOW_SHARE = 0.1
_SLOW_TIMES = 3  # ... so many times in a row.
TAGS = {
    "slowest-process": "Number of the process that spends most time of a step outside of its "
    "devices.",
    "slowest-process-seconds": "Time a step that the slowest process spends there (seconds).",
    "median-process-seconds": "Time a step that the median process spends there (seconds).",
}
"""What TensorBoard shows of the slowest process, with two or more processes."""


class Post(NamedTuple):
    """What a process posted last."""

    host: str
    doing: phases.Doing
    last_step: phases.StepEnd | None
    number: int = 0
    """How many posts it made before."""


class Slow(NamedTuple):
    """The process that keeps the others waiting longest."""

    process: int
    host: str
    own: float
    """Seconds a step that it spends outside of the devices."""
    median: float
    """The same for the median process (the lower of two)."""
    step: float
    """The whole step (seconds)."""
    n_times: int = 0
    """How often in a row it was this process, and by more than a tenth of a step."""

    @property
    def holds_up(self) -> bool:
        """Return whether this is more than chance."""
        return self.n_times >= _SLOW_TIMES


class Peers:
    """Posts what this process is doing, and keeps what the others posted."""

    def __init__(
        self,
        clock: phases.Phases,
        process: int,
        n_processes: int,
        every: float,
        node: node_speaker.Node | None = None,
    ):
        """Post nothing yet; `node` is that of this process in a large run."""
        self._node, self._n_posts = node, 0
        self._clock, self._process, self._n, self._every = clock, process, n_processes, every
        self._silent = (_SILENT_TIMES + (node is not None)) * every
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._posts: dict[int, Post] = {}
        self._changed: dict[int, float] = {}  # when each process last posted something new
        self._ends: dict[int, phases.StepEnd] = {}
        self._slow: Slow | None = None
        self._answered = time.monotonic()  # when the service did so last

    def start(self) -> None:
        """Begin to post each `every` seconds, unless this process is the only one."""
        if self._n > 1:
            threading.Thread(target=self._run, name="peers", daemon=True).start()

    def close(self) -> None:
        """Stop posting."""
        self._closed.set()

    def slowest(self) -> Slow | None:
        """Return the slowest process of the last seconds; None where it is not known."""
        with self._lock:
            return self._slow

    def behind(self) -> list[str]:
        """Return lines on who holds the others up; only the processes that read know."""
        if self._n == 1 or self._process >= _READERS:
            return []
        now = time.monotonic()
        with self._lock:
            posts, changed, answered = dict(self._posts), dict(self._changed), self._answered
        if now - answered > self._silent:
            return [f"process 0{_at(posts.get(0))} has not answered for {now - answered:.0f} s"]
        lines = []
        for i in range(self._n):
            silence = now - changed[i] if i in posts else math.inf
            if silence > self._silent:
                lines.append(f"process {i}{_silent(posts.pop(i, None), silence)}")
        for i in held_up_by({i: post.doing for i, post in posts.items()}):
            step, phase, seconds = posts[i].doing
            seconds += now - changed[i]
            where = f"process {i}{_at(posts[i])} has been in '{phase}'"
            lines.append(f"{where} after step {step} for {seconds:.0f} s")
        return lines or ["every process waits for its devices: see the logs of GPUs and network"]

    def _run(self) -> None:
        while not self._closed.wait(self._every):
            try:
                self.exchange()
            except Exception:  # the service is gone: JAX ends this process, and says why
                continue

    def exchange(self) -> None:
        """Post what this process is doing, or have its node's speaker do it; read the posts."""
        post = Post(
            socket.gethostname(), self._clock.doing(), self._clock.last_step(), self._n_posts
        )
        self._n_posts += 1
        posts = {self._process: post}
        if self._node is None or self._node.speaks or not self._node.tell(json.dumps(posts)):
            for text in self._node.told() if self._node else ():
                posts |= json.loads(text)
            messages.post(f"peers/{self._process}", json.dumps(posts))
        if self._process < _READERS:
            self._read(messages.posted("peers"))

    def _read(self, posted: dict[str, str]) -> None:
        now = time.monotonic()
        with self._lock:
            self._answered = now
            for name, entry in (
                pair for text in posted.values() for pair in json.loads(text).items()
            ):
                host, doing, end, number = entry
                end = phases.StepEnd(*end) if end else None
                process = int(name)
                before = self._posts.get(process)
                if before is None or number > before.number:
                    self._posts[process] = Post(host, phases.Doing(*doing), end, number)
                    self._changed[process] = now
            ends = {i: post.last_step for i, post in self._posts.items() if post.last_step}
            worst = slowest(self._ends, ends, self._posts, self._slow)
            if worst or len(ends) > len(self._ends):
                self._slow, self._ends = worst, ends


def held_up_by(doing: Mapping[int, phases.Doing]) -> list[int]:
    """Return the processes that the others wait for.

    They are behind, or busy while others wait for devices; where all are busy, they do something
    else than most.
    """
    last = max((d.step for d in doing.values()), default=0)
    busy = {i: d for i, d in doing.items() if d.phase != phases.DEVICE or d.step < last}
    if len(busy) < len(doing):
        return list(busy)
    common = collections.Counter((d.step, d.phase) for d in busy.values()).most_common(1)
    others = [i for i, d in busy.items() if (d.step, d.phase) != common[0][0]] if busy else []
    return others or list(busy)


def slowest(
    before: Mapping[int, phases.StepEnd],
    after: Mapping[int, phases.StepEnd],
    posts: Mapping[int, Post],
    last: Slow | None = None,
) -> Slow | None:
    """Return the process that spent most time of its own on a step between two moments.

    `last` is what this function returned the time before. Returns None until every process has
    taken a step.
    """
    own: dict[int, float] = {}
    whole: list[float] = []
    for process, end in after.items():
        start = before.get(process)
        if start is None or end.step <= start.step:
            return None
        own[process] = (end.own_seconds - start.own_seconds) / (end.step - start.step)
        whole.append((end.seconds - start.seconds) / (end.step - start.step))
    if len(own) < 2:
        return None
    worst = max(own, key=lambda process: own[process])
    median = statistics.median_low(own.values())
    step, n_times = statistics.median(whole), 0
    if own[worst] - median > _SLOW_SHARE * step:
        n_times = 1 + (last.n_times if last and last.process == worst else 0)
    return Slow(worst, posts[worst].host, own[worst], median, step, n_times)


def _at(post: Post | None) -> str:
    return f" ({post.host})" if post else ""


def _silent(post: Post | None, silence: float) -> str:
    """Say for how long a process has posted nothing, and what it was doing before.

    Its last phase matters: a process whose own watchdog ended it is silent too.
    """
    if post is None:
        return " has not been heard of"
    before = f"before, it was in '{post.doing.phase}' after step {post.doing.step}"
    return f"{_at(post)} has not been heard of for {silence:.0f} s; {before}"
