"""The checks over all processes: each tells its facts, the first decides, all hear the verdict.

They talk through the coordination service. A collective would hang on just what is looked for.
"""

import json
import secrets
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax

from gpt3jax import errors, step
from gpt3jax.config import schema, validation
from gpt3jax.data import skipping
from gpt3jax.distributed import messages
from gpt3jax.preflight import checks, facts, program
from gpt3jax.run import start_report, startup


class Session:
    """One series of rounds; all processes must go through the same ones."""

    def __init__(self, cfg: schema.Config):
        """No round yet; a host's name is told first, so that one which stops later has it."""
        self.cfg = cfg
        self.me, self.n = messages.process()
        self.checks: list[checks.Check] = []
        # A process that is stopped should be named before JAX's service ends all for its silence.
        heartbeat = cfg.distributed.heartbeat_timeout
        self._timeout = min(cfg.distributed.start_timeout, 0.8 * heartbeat)
        self.hosts: list[str] = [facts.host()]
        if self.me:
            messages.publish(f"host/{self.me}", facts.host())

    def wait_long(self) -> None:
        """From here on wait as long as for the start: others may restore or map a corpus."""
        self._timeout = float(self.cfg.distributed.start_timeout)

    def round(
        self, name: str, mine: Any, judge: Callable[[list[Any]], Sequence[checks.Check]]
    ) -> list[checks.Check]:
        """Gather what each process has to tell, let the first judge, and return its verdict.

        Raises:
            TransientError: the first process does not answer, or others do not, on the first.
            UserError: the verdict refuses the run.
        """
        told = self._gather(name, json.dumps(mine))
        verdict: list[checks.Check] = []
        if self.me == 0:
            verdict = [*self._answered(told), *judge(told)]
        return self._conclude(name, verdict, all(one is not None for one in told))

    def on_hosts(self, with_gpus: bool = False) -> list[checks.Check]:
        """Compare all that needs no device: code, settings, files, folders, clocks.

        Raises:
            UserError, TransientError: as `round`.
        """
        token = secrets.token_hex(8)
        planted: list[Any] = []
        wrong: dict[str, str] = {}
        if self.me == 0:
            planted, wrong = facts.plant(self.cfg, token)
            if self.n > 1:
                messages.publish("token", token)
        else:
            token = self._hear("token")
        try:
            mine: dict[str, Any] = facts.of_host(self.cfg, token, self.me == 0)
            mine["folders"] |= wrong
            mine["used"] = facts.used_gpus() if with_gpus else {}
            told = self._gather("hosts", json.dumps(mine))
        finally:
            facts.uproot(planted)
        offsets = self._clock_offsets(told)
        verdict: list[checks.Check] = []
        if self.me == 0:
            self.used = [one and one["used"] for one in told]
            verdict = [*self._answered(told), *_of_hosts(self.hosts, told)]
            n_folders = len([f for f in facts.FOLDERS if schema.flatten(self.cfg)[f]])
            of_folders = [one and one["folders"] for one in told]
            verdict.append(checks.folders(self.hosts, of_folders, n_folders))
            verdict.append(checks.clocks(self.hosts, offsets))
        return self._conclude("hosts", verdict, all(one is not None for one in told))

    def on_devices(self) -> list[checks.Check]:
        """Compare the processes' devices.

        Raises:
            UserError, TransientError: as `round`.
        """

        def judge(told: list[Any]) -> Sequence[checks.Check]:
            return [checks.devices(self.hosts, told)]

        return self.round("devices", facts.devices(), judge)

    def on_program(self, built: step.Program, batch_size: int) -> list[checks.Check]:
        """Compare the training step that each process is about to compile.

        Raises:
            UserError, TransientError: as `round`.
        """

        def judge(told: list[Any]) -> Sequence[checks.Check]:
            return [checks.same("program", self.hosts, told, "fail", next(iter(told[0].values())))]

        mine = {"training step": program.fingerprint(built, self.cfg, batch_size)}
        return self.round("program", mine, judge)

    def on_memory(self, built: step.Program) -> list[checks.Check]:
        """Compare what each device has free with what a step needs.

        Raises:
            UserError, TransientError: as `round`.
        """
        limit = start_report.device_memory()
        needed = start_report.step_bytes(self.cfg, built.mesh, built.compute.attention, limit)

        def judge(told: list[Any]) -> Sequence[checks.Check]:
            return [checks.memory(self.hosts, told, self.used, needed)]

        return self.round("memory", facts.free_bytes(), judge)

    def _answered(self, told: Sequence[Any]) -> list[checks.Check]:
        """Return a check for who is silent; in the first round also where all answered."""
        if not any(one is None for one in told) and any(c.name == "processes" for c in self.checks):
            return []
        return [checks.answers(self.hosts, told)]

    def _gather(self, name: str, text: str) -> list[Any]:
        told = messages.gather(name, text, self._timeout)
        if self.me == 0 and len(self.hosts) < self.n:
            others = [messages.receive(f"host/{i}", 0) for i in range(1, self.n)]
            self.hosts = [facts.host(), *(one or "host unknown" for one in others)]
        return [None if one is None else json.loads(one) for one in told]

    def _clock_offsets(self, told: Sequence[Any]) -> list[tuple[float, float] | None]:
        """Return (seconds ahead of the first process, uncertainty) of each, in the first.

        All that answered wait for its word and then tell their time, so that it lies between the
        word and the answer's arrival.
        """
        if self.me:
            self._hear("clock")
            messages.gather("clocks", repr(time.time()), self._timeout)
            return []
        if self.n == 1:
            return [(0.0, 0.0)]
        sent = time.time()
        messages.publish("clock", "now")
        offsets: list[tuple[float, float] | None] = [(0.0, 0.0)]
        for i in range(1, self.n):
            theirs = told[i] and messages.receive(f"clocks/{i}", self._timeout)
            came = time.time()
            middle, half = (sent + came) / 2, (came - sent) / 2
            offsets.append((float(theirs) - middle, half) if theirs else None)
        return offsets

    def _conclude(
        self, name: str, verdict: list[checks.Check], all_there: bool
    ) -> list[checks.Check]:
        """Tell the verdict to all, or hear it, and refuse the run if it says so."""
        if self.n > 1:
            text = json.dumps([checks.to_json(verdict), all_there])
            if self.me == 0:
                messages.publish(f"verdict/{name}", text)
            else:
                data, all_there = json.loads(self._hear(f"verdict/{name}"))
                verdict = checks.from_json(data)
        self.checks += verdict
        if any(check.status in ("fail", "retry") for check in verdict) and all_there:
            messages.leave()
        checks.refuse(verdict, self.me)
        return verdict

    def _hear(self, name: str) -> str:
        text = messages.receive(name, 2 * self._timeout)  # it waits for others meanwhile
        if text is None:
            raise errors.TransientError(
                f"preflight: process {self.me} ({facts.host()}) heard nothing from process 0 for "
                f"{2 * self._timeout:.0f} s: look at its output"
            )
        return text


def _of_hosts(hosts: Sequence[str], told: list[Any]) -> list[checks.Check]:
    def of(name: str) -> list[Any]:
        return [one and one[name] for one in told]

    return [
        checks.same("code", hosts, of("code"), "fail", "{n} files"),
        checks.same("versions", hosts, of("versions"), "fail", "{n} packages"),
        checks.environment(hosts, of("environment")),
        checks.same("config", hosts, of("config"), "fail", "{n} fields"),
        checks.corpus(hosts, of("corpus")),
    ]


def before_devices(cfg: schema.Config) -> Session | None:
    """Make the quick checks of `gpt3jax.main`; None where one process trains alone.

    Raises:
        UserError, TransientError: the processes do not go together; it says which and why.
    """
    if messages.process()[1] == 1 or not cfg.distributed.preflight:
        return None
    session = Session(cfg)
    session.on_hosts()
    session.on_devices()
    session.wait_long()
    return session


def before_step(session: Session | None, run: startup.Run, consumed_samples: int) -> list[str]:
    """Compare the program that the first step runs; return what the quick checks warn of.

    Raises:
        UserError, TransientError: as `before_devices`.
    """
    if session is None:
        return []
    if consumed_samples < run.end.samples:
        session.on_program(run.program, run.schedule.size(consumed_samples))
    warned = [check for check in session.checks if check.status == "warn"]
    return [f"WARNING: {check.name}: {line.text}" for check in warned for line in check.lines]


def abstract_program(cfg: schema.Config, mesh: jax.sharding.Mesh) -> tuple[step.Program, int]:
    """Return the program of a run that starts anew, and its first batch size.

    Raises:
        UserError: the config does not fit the devices, or its schedules the run.
    """
    schedule = startup.schedule_of(cfg, mesh)
    _, samples = skipping.run_length(cfg, schedule)
    validation.check_schedule(cfg.optimizer, samples)
    return step.build(cfg, mesh, samples), schedule.size(0)
