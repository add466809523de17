"""The checks over all processes: each reports its facts, process 0 decides, all get the verdict.

They communicate through JAX's coordination service: a collective would hang on the very faults that
the checks look for.
"""

import json
import pathlib
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

from gpt3jax import errors, step
from gpt3jax.config import batch_schedule, layout, schema
from gpt3jax.distributed import messages, node_speaker
from gpt3jax.preflight import checks, process_facts
from gpt3jax.run import layout_choice, start_report, startup, step_log

# What a process reports in a round, from JSON; None: it was silent.
Answer: TypeAlias = Any


class Session:
    """A series of rounds; all processes must make the same ones in the same order."""

    def __init__(self, cfg: schema.Config):
        """Publish this host's name, so that a process that stops later can be named with it."""
        self.cfg = cfg
        self.me, self.n = messages.process()
        self.checks: list[checks.Check] = []
        self._compared: list[str] = []
        # Name a stopped process before JAX's service ends all processes because of it.
        heartbeat = cfg.distributed.heartbeat_timeout
        self._timeout = min(cfg.distributed.start_timeout, 0.8 * heartbeat)
        self.hosts: list[str] = [process_facts.host()]
        if self.me:
            messages.publish(f"host/{self.me}", process_facts.host())

    def wait_long(self) -> None:
        """Wait as long as for the start from now on: others may restore or map a corpus."""
        self._timeout = float(self.cfg.distributed.start_timeout)

    def round(
        self, name: str, answer: Answer, judge: Callable[[list[Answer]], Sequence[checks.Check]]
    ) -> list[checks.Check]:
        """Gather the answers of all processes, let process 0 judge them, and return its verdict.

        Raises:
            TransientError: process 0 does not answer, or, in process 0, another one does not.
            UserError: the verdict refuses the run.
        """
        answers = self._gather(name, answer)
        verdict: list[checks.Check] = []
        if self.me == 0:
            verdict = [*self._check_answered(answers), *judge(answers)]
        return self._conclude(name, verdict, all_there=None not in answers)

    def on_hosts(self, *, with_gpus: bool = False) -> list[checks.Check]:
        """Compare all that needs no device: code, settings, files, folders, clocks.

        Raises:
            UserError, TransientError: as `round`.
        """
        token = secrets.token_hex(8)
        planted: list[pathlib.Path] = []
        problems: dict[str, str] = {}
        if self.me == 0:
            planted, problems = process_facts.plant(self.cfg, token)
            if self.n > 1:
                messages.publish("token", token)
        else:
            token = self._receive("token")
        try:
            speaks = self.me == 0 or node_speaker.speaks()
            answer = process_facts.of_host(self.cfg, token, first=self.me == 0, with_files=speaks)
            if self.me == 0:
                answer["folders"] = problems
            used = process_facts.used_gpus() if with_gpus and speaks else {}
            answers = self._gather_facts("hosts", {**answer, "used": used})
        finally:
            process_facts.uproot(planted)
        offsets = self._clock_offsets(answers, speaks=speaks)
        verdict: list[checks.Check] = []
        if self.me == 0:
            self.used = _part(answers, "used")
            verdict = [*self._check_answered(answers), *_host_checks(self.hosts, answers)]
            n_folders = len([f for f in process_facts.FOLDERS if schema.flatten(self.cfg)[f]])
            verdict.append(checks.folders(self.hosts, _part(answers, "folders"), n_folders))
            verdict.append(checks.clocks(self.hosts, offsets))
        return self._conclude("hosts", verdict, all_there=None not in answers)

    def on_devices(self) -> list[checks.Check]:
        """Compare the processes' devices.

        Raises:
            UserError, TransientError: as `round`.
        """

        def judge(answers: list[Answer]) -> Sequence[checks.Check]:
            return [checks.devices(self.hosts, answers)]

        return self.round("devices", process_facts.devices(), judge)

    def on_program(
        self, built: step.Program, cfg: schema.Config, batch_size: int
    ) -> list[checks.Check]:
        """Compare the training step that each process is about to compile, unless it was compared.

        `cfg` has the layout of `built`.

        Raises:
            UserError, TransientError: as `round`.
        """
        described = f"{batch_size} {layout.of(cfg)}"
        if described in self._compared:
            return []
        self._compared.append(described)
        fingerprint = process_facts.program(built, cfg, batch_size)

        def judge(answers: list[Answer]) -> Sequence[checks.Check]:
            return [checks.same("program", self.hosts, answers, "fail", fingerprint)]

        name = f"program/{len(self._compared)}"
        return self.round(name, {"training step": fingerprint}, judge)

    def on_memory(self, built: step.Program, cfg: schema.Config) -> list[checks.Check]:
        """Compare the free memory of each device with what a step of this layout needs.

        Raises:
            UserError, TransientError: as `round`.
        """
        limit = layout_choice.memory_limit()
        needed = start_report.step_bytes(cfg, built.mesh, built.compute.attention, limit)

        def judge(answers: list[Answer]) -> Sequence[checks.Check]:
            return [checks.memory(self.hosts, answers, self.used, needed)]

        return self.round("memory", process_facts.free_bytes(), judge)

    def _check_answered(self, answers: Sequence[Answer]) -> list[checks.Check]:
        """Return a check that names silent processes; with none silent, only in the first round."""
        if None not in answers and any(check.name == "processes" for check in self.checks):
            return []
        return [checks.all_answered(self.hosts, answers)]

    def _gather_facts(self, name: str, answer: Mapping[str, Answer]) -> list[Answer]:
        """Gather what is nearly the same everywhere: digests from all, and each value once."""
        digests = {part: process_facts.digest(value) for part, value in answer.items()}
        answers = self._gather(name, digests)
        values = {digests[part]: value for part, value in answer.items()}
        if self.me:
            parts = json.loads(self._receive(f"wanted/{name}")).get(str(self.me))
            if parts:
                text = json.dumps({digests[part]: answer[part] for part in parts})
                messages.publish(f"facts/{name}/{self.me}", text)
            return []
        wanted: dict[int, list[str]] = {}
        for i, theirs in enumerate(answers):
            for part, digest in (theirs or {}).items():
                if digest not in values:
                    values[digest] = None  # until it is there
                    wanted.setdefault(i, []).append(part)
        if self.n > 1:
            messages.publish(f"wanted/{name}", json.dumps(wanted))
        for i in wanted:
            values |= json.loads(messages.receive(f"facts/{name}/{i}", self._timeout) or "{}")
        return [a and {part: values[digest] for part, digest in a.items()} for a in answers]

    def _gather(self, name: str, answer: Answer) -> list[Answer]:
        texts = messages.gather(name, json.dumps(answer), self._timeout)
        if self.me == 0 and len(self.hosts) < self.n:
            names = messages.posted("host")
            others = [names.get(str(i), "host unknown") for i in range(1, self.n)]
            self.hosts = [process_facts.host(), *others]
        return [None if text is None else json.loads(text) for text in texts]

    def _clock_offsets(
        self, answers: Sequence[Answer], *, speaks: bool
    ) -> list[tuple[float, float] | None]:
        """Return, in process 0, (seconds ahead of process 0, uncertainty) of each process.

        In a large run only those are asked that speak for their node, and `speaks` says whether
        this one does. Processes that answered wait for its request and then send their time, which
        therefore lies between the request and the arrival of the reply.
        """
        if self.me:
            if speaks:
                self._receive("clock")
                messages.publish(f"clocks/{self.me}", repr(time.time()))
            return []
        if self.n == 1:
            return [(0.0, 0.0)]
        sent = time.time()
        messages.publish("clock", "now")
        offsets: list[tuple[float, float] | None] = [(0.0, 0.0)]
        for i in range(1, self.n):
            is_asked = answers[i] is not None and answers[i]["code"] is not None
            theirs = is_asked and messages.receive(f"clocks/{i}", self._timeout)
            received = time.time()
            middle, half = (sent + received) / 2, (received - sent) / 2
            offsets.append((float(theirs) - middle, half) if theirs else None)
        return offsets

    def _conclude(
        self, name: str, verdict: list[checks.Check], *, all_there: bool
    ) -> list[checks.Check]:
        """Send the verdict to all, or receive it, and refuse the run if a check failed."""
        if self.n > 1:
            text = json.dumps([checks.to_json(verdict), all_there])
            if self.me == 0:
                messages.publish(f"verdict/{name}", text)
            else:
                data, all_there = json.loads(self._receive(f"verdict/{name}"))
                verdict = checks.from_json(data)
        self.checks += verdict
        if any(check.status in ("fail", "retry") for check in verdict) and all_there:
            messages.leave()
        checks.refuse(verdict, self.me)
        return verdict

    def _receive(self, name: str) -> str:
        text = messages.receive(name, 2 * self._timeout)  # process 0 waits for others meanwhile
        if text is None:
            raise errors.TransientError(
                f"preflight: process {self.me} ({process_facts.host()}) heard nothing from process "
                f"0 for {2 * self._timeout:.0f} s: look at its output",
                page="preflight.md#starting",
            )
        return text


def _host_checks(hosts: Sequence[str], answers: Sequence[Answer]) -> list[checks.Check]:
    return [
        checks.same("code", hosts, _part(answers, "code"), "fail", "{n} files"),
        checks.same("versions", hosts, _part(answers, "versions"), "fail", "{n} packages"),
        checks.environment(hosts, _part(answers, "environment")),
        checks.same("config", hosts, _part(answers, "config"), "fail", "{n} fields"),
        checks.corpus(hosts, _part(answers, "corpus")),
    ]


def _part(answers: Sequence[Answer], name: str) -> list[Answer]:
    return [answer and answer[name] for answer in answers]


def before_devices(cfg: schema.Config) -> Session | None:
    """Make the quick checks before training; return None if one process trains alone.

    Raises:
        UserError, TransientError: the processes do not match; the message says which and why.
    """
    if messages.process()[1] == 1 or not cfg.distributed.preflight:
        return None
    session = Session(cfg)
    session.on_hosts()
    session.on_devices()
    session.wait_long()
    return session


def before_step(session: Session | None, run: startup.Run, consumed_samples: int) -> list[str]:
    """Compare the program of the first step; return the warnings of all quick checks.

    Raises:
        UserError, TransientError: as `before_devices`.
    """
    if session is None:
        return []
    if consumed_samples < run.end.samples:
        session.on_program(run.program, run.cfg, run.stretch(consumed_samples)[0])
    warnings = [check for check in session.checks if check.status == "warn"]
    return [f"WARNING: {check.name}: {line.text}" for check in warnings for line in check.lines]


def comparison(session: Session | None) -> Callable[[step.Program, schema.Config, int], None]:
    """Return a function that compares a program with those of other processes before it compiles.

    It gets the program, the config with its layout, and the batch size.
    """

    def compare(built: step.Program, cfg: schema.Config, batch_size: int) -> None:
        if session is not None:
            session.on_program(built, cfg, batch_size)

    return compare


def first_step(session: Session) -> tuple[layout_choice.LaidOut, int]:
    """Return the step of a new run, and its batch size; all processes have the same.

    Raises:
        UserError: the config does not fit the devices, or its schedules do not fit the run.
    """
    cfg = session.cfg
    choice = layout_choice.decide(cfg, dict, comparison(session))
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    _, samples = startup.run_length(cfg, schedule, step_log.Position(0, 0))
    size = schedule.size(0)
    return layout_choice.built_first(choice, size, samples), size
