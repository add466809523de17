"""The clock of a run and its readers: watchdog, account of the time, search for slow processes."""

import contextlib

import jax

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.distributed import messages, node_speaker
from gpt3jax.record import recording
from gpt3jax.watch import goodput, phases, stragglers, watchdog


class Oversight(contextlib.AbstractContextManager["Oversight"]):
    """Watches a start of a run, whose time it measures from the beginning of the process."""

    def __init__(self, cfg: schema.Config) -> None:
        """Start the watchdog, once the processes have joined."""
        self.clock = phases.Phases(phases.process_start())
        self._cfg = cfg
        self._named = set[int]()  # slow processes that a warning has named
        process, n = jax.process_index(), jax.process_count()
        tick = min(10.0, cfg.watchdog.min_seconds / 4)
        self._peers = stragglers.Peers(self.clock, process, n, tick, node_speaker.node())
        self._peers.start()
        self._watchdog = watchdog.Watchdog(cfg.watchdog, self.clock, self._peers, process, tick)
        self._account: goodput.Account | None = None

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._watchdog.close()
        self._peers.close()
        # After any other error the run may be started again in the hope that the error is gone.
        is_final = kind is not None and issubclass(kind, errors.UserError)
        if is_final and kind is not errors.TransientError and self._account is not None:
            with contextlib.suppress(errors.UserError):
                self._account.close("refused")

    def begin(self, step: int, mesh: str) -> None:
        """Open the account of the time; the run goes on after this step, on a mesh (in words).

        Raises:
            UserError: too many starts in a row saved nothing, or log.dir cannot be written.
        """
        folder = self._cfg.log.dir if jax.process_index() == 0 else ""
        devices = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
        layout = {"mesh": mesh, "devices": devices, "jax": jax.__version__}
        self._account = goodput.Account(folder, self.clock, step, layout)
        most = self._cfg.train.max_fruitless_starts
        if most and messages.of_first_process(self._account.n_fruitless >= most):
            raise errors.UserError(
                f"{most} starts in a row failed after step {step} and saved nothing: find out why "
                "in their logs, then start again (train.max_fruitless_starts=0 takes any number)",
                page="operations.md#exit-statuses",
            )

    def stepped(self, step: int, recorder: recording.Recorder) -> None:
        """Note a step; at each logging interval plot the account and the slowest process."""
        assert self._account is not None
        self._account.update(step)
        if step % self._cfg.log.interval == 0:
            recorder.plot(step, self._account.scalars() | self._slowest(recorder))

    def end(self, complete: bool) -> str:
        """Close the account; return its summary, a line."""
        assert self._account is not None
        self._account.close("complete" if complete else "stopped")
        return self._account.summary()

    def _slowest(self, recorder: recording.Recorder) -> dict[str, float]:
        """Return what to plot of the slowest process; warn once of each that is too slow."""
        slow = self._peers.slowest()
        if slow is None:
            return {}
        if slow.holds_up and slow.process not in self._named:
            self._named.add(slow.process)
            recorder.say(
                f"WARNING: process {slow.process} ({slow.host}) spends {slow.own:.3f} s a step "
                f"outside of its devices, where the median is {slow.median:.3f} s: every step "
                f"waits for it ({slow.step:.3f} s)"
            )
        return dict(zip(stragglers.TAGS, (slow.process, slow.own, slow.median), strict=True))
