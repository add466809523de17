"""Weights & Biases: one run there for all starts of a run here, fed by a thread of its own.

Only this file imports wandb, and only if log.wandb_project is set. No step waits for W&B, and none
of its failures ends a run: after one of them a warning says so, and W&B gets nothing more.
"""

import dataclasses
import os
import pathlib
import queue
import secrets
import threading
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

from gpt3jax import errors
from gpt3jax.config import schema, user_paths
from gpt3jax.record import json_files

START_SECONDS = 20.0  # to reach the server, before a start is recorded offline
FINISH_SECONDS = 20.0  # to upload the rest at the end
MAX_WAITING = 10_000  # actions, of about 1 KB
# W&B's own variables come first: WANDB_CONSOLE=wrap sends the console too.
_SETTINGS = {
    "console": "off",
    "disable_code": True,
    "disable_git": True,
    "init_timeout": START_SECONDS,
    "finish_timeout": FINISH_SECONDS,
    "finish_timeout_raises": True,
    "quiet": True,
    "x_transaction_log_flush_interval": 1.0,  # seconds; after a kill W&B lacks what is newer
}
_PAGE = "watching.md#weights--biases"
_Run: TypeAlias = Any  # wandb.Run: wandb may not be installed


def problem(log: schema.Log) -> errors.UserError | None:
    """Return the error to raise if wandb is not installed, or nobody is logged in.

    The server need not answer: whether it takes the key is seen later.
    """
    given = f"log.wandb_project={log.wandb_project}"
    try:
        import wandb

        _settings()
        common = wandb.setup().settings
        offline = common.mode in ("offline", "dryrun", "disabled")
        if offline or wandb.login(verify=False, prompt=False):
            return None
    except ImportError:
        return errors.UserError(
            f"{given} needs the extra: pip install 'gpt3jax[wandb]'", page=_PAGE
        )
    except Exception as error:  # a wrong variable, a malformed key, an old wandb: of any kind
        return errors.UserError(
            f"{given}: wandb cannot be used ({error}): correct its settings, or install the "
            "version of the extra: pip install 'gpt3jax[wandb]'",
            page=_PAGE,
        )
    return errors.UserError(
        f"{given}: nobody is logged in to {common.base_url}: run `wandb login`, set "
        "WANDB_API_KEY, or set WANDB_MODE=offline and upload later with `wandb sync`",
        page=_PAGE,
    )


class WandbRun:
    """The run at W&B. No method raises, and none but `close` waits."""

    def __init__(self, cfg: schema.Config, n_rows: int, say: Callable[[str], None]) -> None:
        """Begin or resume the run, in the thread.

        `n_rows` are the rows that earlier starts may have sent. `say` prints a line.
        """
        self._cfg, self._say = cfg, say
        self._with_next_row: dict[str, float] = {}
        self._over = False
        self._actions = queue.Queue[Callable[[_Run], object] | None](MAX_WAITING)
        self._n_rows = n_rows
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def log(self, step: int, consumed_samples: int, values: Mapping[str, float]) -> None:
        """Send a row of values, by TensorBoard's tags."""
        row = self._with_next_row | dict(values)
        row |= {"step": step, "consumed_samples": consumed_samples}
        self._with_next_row = {}
        self._do(lambda run: self._send(run, row))

    def add_to_next_row(self, values: Mapping[str, float]) -> None:
        """Send values of a step whose row is still to come."""
        self._with_next_row |= values

    def alert(self, text: str) -> None:
        """Send an alert; W&B passes on one a minute."""
        self._do(lambda run: run.alert(title="numerical fault", text=text))

    def close(self, status: int) -> None:
        """End the run as this process will end, and wait until all is uploaded, but not for long.

        A second call does nothing.
        """
        self._do(lambda run: _finish(run, status))
        self._do(None)
        if not self._over:
            self._thread.join(START_SECONDS + FINISH_SECONDS + 5.0)
        if self._thread.is_alive():
            self._fail("it does not answer")
        self._over = True

    def _send(self, run: _Run, row: Mapping[str, float]) -> None:
        """Send a row under W&B's own step, its number: the run's step may come again."""
        run.log(row, step=self._n_rows, commit=True)
        self._n_rows += 1

    def _do(self, action: Callable[[_Run], object] | None) -> None:
        """Let the thread do something with the run; None ends the thread."""
        if self._over:
            return
        try:
            self._actions.put_nowait(action)
        except queue.Full:
            self._fail(f"it is {MAX_WAITING} rows behind")

    def _fail(self, reason: str) -> None:
        if not self._over:
            self._over = True
            self._say(
                f"WARNING: Weights & Biases gets nothing more ({reason}); what it did not get may "
                f"be in {self._folder}/wandb: see `wandb sync`. metrics.jsonl has all of it"
            )

    def _work(self) -> None:
        try:
            run = self._begin()
            self._n_rows = max(self._n_rows, run.step)
            while (action := self._actions.get()) is not None:
                action(run)
        except Exception as error:  # of any kind: its process died, its folder is full, a timeout
            self._fail(str(error) or type(error).__name__)

    def _begin(self) -> _Run:
        """Begin or resume the run; if the server cannot be reached, offline."""
        import wandb

        owner, _, project = self._cfg.log.wandb_project.rpartition("/")
        options = {
            "entity": owner or None,
            "project": project,
            "dir": self._folder,
            "config": dataclasses.asdict(self._cfg),
            "allow_val_change": True,
            "resume": "allow",
            "settings": _settings(),
            **self._identity(),
        }
        try:
            run = wandb.init(**options)
        except wandb.errors.CommError as error:  # it may not want this key, or project
            reason = " ".join(str(error).split())
            self._say(
                f"WARNING: Weights & Biases cannot be used ({reason}): this start is recorded in "
                f"{self._folder}/wandb; upload it later with `wandb sync`"
            )
            wandb.teardown()  # the attempt holds the run's id
            run = wandb.init(**options, mode="offline")
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _identity(self) -> dict[str, str]:
        """Return the id of all starts, which a file keeps; for the first one a name too."""
        file = self._folder / "wandb.json"
        if file.exists():
            return {"id": user_paths.read_json(file, _PAGE)["id"]}
        run_id = secrets.token_hex(8)
        json_files.replace_file(file, json_files.to_json({"id": run_id}) + "\n")
        name = self._folder.parent.name if self._folder.name == "logs" else self._folder.name
        return {"id": run_id, "name": os.environ.get("WANDB_NAME", name)}

    @property
    def _folder(self) -> pathlib.Path:
        return pathlib.Path(self._cfg.log.dir).absolute()


def _settings() -> Any:
    """Return our wandb.Settings, without those that the environment has."""
    import wandb

    mine = {k: v for k, v in _SETTINGS.items() if f"WANDB_{k.upper()}" not in os.environ}
    return wandb.Settings(**mine)


def _finish(run: _Run, status: int) -> None:
    if status == errors.REQUEUE:
        run.mark_preempting()  # it is to go on: W&B shows "preempted" in place of "failed"
    run.finish(exit_code=status)
