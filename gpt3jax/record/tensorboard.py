"""TensorBoard's files, and the tags in them: Megatron's where it has them.

What the values mean stands in `metrics`. The account of the run's time and the search for slow
processes have further tags: `goodput.TAGS` and `stragglers.TAGS`.
"""

import contextlib
import math
import pathlib
import time
from collections.abc import Mapping

from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2, summary_pb2

FLUSH_SECONDS = 10.0  # files are synced to disk at most this often
# Tags and the values that they show, plotted over steps and over samples:
TAGS = {
    "learning-rate": "learning_rate",
    "batch-size": "batch_size",
    "lm loss": "loss",
    "loss-scale": "loss_scale",
    "grad-norm": "grad_norm",
    "world-size": "n_devices",
}
# The same after an evaluation:
EVALUATION_TAGS = {
    "lm loss validation": "validation_loss",
    "lm loss validation ppl": "validation_ppl",
    "lm loss test": "test_loss",
    "lm loss test ppl": "test_ppl",
}
# Over steps only:
STEP_TAGS = {
    "skipped-train-samples": "skipped_samples",
    "skipped-steps": "skipped_in_interval",
    "loss-spikes": "spikes_in_interval",
    "iteration-time": "step_time",
    "throughput": "tflops_per_device",
    "mfu": "mfu",
    "tokens-per-second": "tokens_per_second",
    "tokens-per-second-per-device": "tokens_per_second_per_device",
}
# The same, by JAX's names of a device's memory statistics:
MEMORY_TAGS = {
    "mem-allocated-bytes": "bytes_in_use",
    "mem-max-allocated-bytes": "peak_bytes_in_use",
}


class Events(contextlib.AbstractContextManager["Events"]):
    """One file of events, written by the caller's thread.

    tensorboardX's SummaryWriter writes from a thread of its own. A full disk ends that thread, and
    the run then waits for ever on its queue. It also turns the space of "lm loss" into an
    underscore.
    """

    def __init__(self, folder: pathlib.Path, purge_step: int) -> None:
        """Start a file; readers then drop what the folder's older files have from this step on."""
        folder.mkdir(parents=True, exist_ok=True)
        # The suffix keeps two runs apart that start in the same second.
        self._file = event_file_writer.EventsWriter(str(folder / "events"), f".{time.time_ns()}")
        self._flushed = -math.inf
        start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._write(step=purge_step, session_log=start)

    def __exit__(self, *_: object) -> None:
        self._file.close()

    def plot(self, step: int, values: Mapping[str, float]) -> None:
        """Write scalars by their tags."""
        points = [summary_pb2.Summary.Value(tag=t, simple_value=x) for t, x in values.items()]
        self._write(step=step, summary=summary_pb2.Summary(value=points))

    def write_table(self, step: int, tag: str, rows: Mapping[str, object]) -> None:
        """Write names and values as a table of text."""
        lines = "".join(f"| {name} | {value} |\n" for name, value in rows.items())
        table = summary.text(tag, f"| field | value |\n|---|---|\n{lines}")
        self._write(step=step, summary=table)

    def _write(self, **event: object) -> None:
        self._file.write_event(event_pb2.Event(wall_time=time.time(), **event))
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self._file.flush()
            self._flushed = time.monotonic()
