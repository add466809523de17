"""Reads W&B's .wandb files: LevelDB's log format, with a header, of W&B's own records.

wandb itself reads them only in its Go program.
"""

import json
import pathlib
import struct

from wandb.proto import wandb_internal_pb2

BLOCK_BYTES = 32 * 1024
FULL, LAST = 1, 4  # a record in one chunk, and the last of several


def records(path: pathlib.Path):
    """Yield the records of a file; one that a kill cut short is left out."""
    data = path.read_bytes()
    assert data.startswith(b":W&B")
    place, record = 7, b""
    while place + 7 <= len(data):
        left_in_block = BLOCK_BYTES - place % BLOCK_BYTES
        if left_in_block < 7:  # too few bytes for a chunk's header: padding
            place += left_in_block
            continue
        _checksum, length, kind = struct.unpack("<IHB", data[place : place + 7])
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (FULL, LAST) and place <= len(data):
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


class Start:
    """What W&B kept of one start of a run."""

    def __init__(self, file: pathlib.Path) -> None:
        kinds = {}
        for record in records(file):
            kind = record.WhichOneof("record_type")
            kinds.setdefault(kind, []).append(getattr(record, kind))
        self.run = kinds["run"][0]
        self.config = {item.key: json.loads(item.value_json) for item in self.run.config.update}
        self.rows = [values(history.item) for history in kinds.get("history", ())]
        self.step_metrics = {m.glob_name or m.name: m.step_metric for m in kinds.get("metric", ())}
        self.alerts = [alert.text for alert in kinds.get("alert", ())]
        self.is_preempting = "preempting" in kinds
        self.exit_codes = [end.exit_code for end in kinds.get("exit", ())]


def values(items):
    return {"/".join(i.nested_key) or i.key: float(json.loads(i.value_json)) for i in items}


def starts(log_dir: pathlib.Path):
    """Return the starts of a run in the order of time."""
    return [Start(file) for file in sorted(log_dir.glob("wandb/offline-run-*/*.wandb"))]
