"""Which layout a run uses for each batch size: decided by one process, tried by the compiler.

A layout that was given is used as it is. Otherwise it comes from a file, from the checkpoint that
the run goes on from, or from the plan's closed forms; on CPUs it is data parallelism. The first
layout whose compiled step fits into the devices' memory is used.
"""

import dataclasses
import json
import math
import socket
from collections.abc import Callable, Mapping
from typing import Any

import jax

from gpt3jax import errors, step
from gpt3jax.config import batch_schedule, layout, schema
from gpt3jax.distributed import joining, messages
from gpt3jax.hardware import devices, gpus, xla_flags
from gpt3jax.plan import memory_model, placement, ranking, search
from gpt3jax.sharding import meshes
from gpt3jax.watch import phases

_PAGE = "parallelism.md#the-layout-is-found"


@dataclasses.dataclass(frozen=True, kw_only=True)
class LaidOut:
    """The step of a run in one layout."""

    cfg: schema.Config
    """The config, with the layout's fields: none is `auto`."""
    mesh: jax.sharding.Mesh
    program: step.Program


@dataclasses.dataclass(frozen=True, kw_only=True)
class Choice:
    """The layouts of a run, and how the next one is tried."""

    given: schema.Config
    """The config as the user gave it."""
    ranking: ranking.Ranking
    lines: tuple[str, ...]
    """Warnings about the choice, for the log."""
    before_compiling: Callable[[step.Program, schema.Config, int], None]
    """Compares the program of a batch size with those of the other processes."""

    def without(self, batch_size: int, refused: int) -> "Choice":
        """Return the choice without the first layouts of a batch size, which did not fit."""
        by_size = {**self.ranking.by_size}
        by_size[batch_size] = by_size[batch_size][refused:]
        return dataclasses.replace(self, ranking=dataclasses.replace(self.ranking, by_size=by_size))


def decide(
    cfg: schema.Config,
    kept: Callable[[], Mapping[str, Any]],
    before_compiling: Callable[[step.Program, schema.Config, int], None] = lambda *_: None,
) -> Choice:
    """Return the layouts of a config on the devices of this run; all processes get the same.

    `kept` returns those of the checkpoint that the run goes on from; empty if there are none. They
    stay where neither the devices nor what was given changed.

    Raises:
        UserError: no layout is possible, or a file or a given layout does not fit the devices.
        TooManyProcesses: the devices of a process all idle.
    """
    per_node = _devices_per_node(cfg.distributed.start_timeout)
    lines: list[str] = []

    def by_first() -> str:
        found = _decided(cfg, kept(), per_node, lines.append)
        return json.dumps([ranking.as_json(found), lines])

    text = messages.text_of_first("layouts", by_first, cfg.distributed.start_timeout)
    content, of_first = json.loads(text)
    found = ranking.from_json(content, "the layouts of process 0")
    _check_batches(cfg, found)
    joining.check_all_work(found.n_used)
    return Choice(
        given=cfg, ranking=found, lines=tuple(of_first), before_compiling=before_compiling
    )


def _devices_per_node(timeout: float) -> int:
    """Return how many devices share a host, in process 0; in others those of the process."""
    n_local, hosts = (
        jax.local_device_count(),
        messages.gather("layouts/host", socket.gethostname(), timeout),
    )
    known = [host for host in hosts if host]
    return n_local * max((known.count(host) for host in known), default=1)


def _decided(
    cfg: schema.Config,
    kept: Mapping[str, Any],
    per_node: int,
    say: Callable[[str], None],
) -> ranking.Ranking:
    n_devices, device = jax.device_count(), jax.devices()[0]
    if kept and not cfg.layouts:
        before = ranking.from_json(kept, "the checkpoint")
        same = (before.n_devices, before.device) == (n_devices, device.device_kind)
        sizes = set(search.batch_sizes(cfg))
        if same and before.given == layout.given(cfg) and sizes <= before.by_size.keys():
            by_size = {size: before.by_size[size] for size in sorted(sizes)}
            return dataclasses.replace(before, origin="as before", by_size=by_size)
    if device.platform in ("gpu", "cuda"):
        gpu = _gpu_here(device)
        found = ranking.of_config(cfg, n_devices, gpu, gpus.network_of(gpu, per_node), say)
        return dataclasses.replace(found, device=device.device_kind)
    if cfg.layouts:
        return ranking.read(cfg.layouts, cfg, n_devices)
    return _plain(cfg)


def _plain(cfg: schema.Config) -> ranking.Ranking:
    """Return the layout that was given, with data parallelism in the place of `auto`.

    Raises:
        UserError: it does not fit the devices.
    """
    fields, sizes = layout.of(layout.plain(cfg)), meshes.make_mesh(cfg.mesh).shape
    fields |= {f"mesh.{axis}": size for axis, size in sizes.items()}
    origin = "data parallelism where nothing is given" if layout.automatic(cfg) else "as given"
    return ranking.given(cfg, fields, origin, jax.devices()[0].device_kind)


def _gpu_here(device: jax.Device) -> gpus.Gpu:
    """Return the kind of GPU in this machine, with the memory that JAX's allocator has."""
    gpu = gpus.like(device.device_kind, devices.compute_capability(device))
    limit = memory_limit()
    if limit is None:
        return gpu
    return dataclasses.replace(gpu, memory_bytes=round(limit / xla_flags.MEMORY_FRACTION))


def memory_limit() -> int | None:
    """Return the bytes that a device of this process offers; None where that is not known."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats.get("bytes_limit")


def _check_batches(cfg: schema.Config, found: ranking.Ranking) -> None:
    """Check that each batch divides over the ranks of its layouts, and so does an evaluation.

    Raises:
        UserError: one does not.
    """
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    for _, size in schedule.stages:
        for row in found.by_size[size]:
            ranks = layout.n_ranks(row.fields)
            batch_schedule.check_size(schedule, size, row.fields["batch.microbatch_size"], ranks)
            batch_schedule.check_size(schedule, cfg.batch.global_batch_size, 1, ranks)


def lay_out(
    choice: Choice,
    batch_size: int,
    run_samples: int,
    clock: phases.Phases,
    say: Callable[[str], None],
    now: LaidOut | None = None,
) -> tuple[Choice, LaidOut]:
    """Return the step of a batch size in the first of its layouts that fits, and the choice left.

    Where the devices' memory is known, each is compiled to see what it needs. All processes must
    call it; process 0 decides. A layout equal to that of `now` shares its program.

    Raises:
        UserError: none fits; or the model does not fit the mesh.
    """
    rows, limit = choice.ranking.by_size[batch_size], memory_limit()
    if limit is None:
        return choice, _build(choice.given, rows[0].fields, run_samples, now)
    tried: list[tuple[float, int, LaidOut]] = []
    for i, row in enumerate(rows):
        laid = _build(choice.given, row.fields, run_samples, now)
        needed = _compiled_bytes(choice, laid, batch_size, clock, say)
        spare = _headroom(laid, batch_size, limit) if len(rows) > 1 else 0.0
        if messages.of_first_process(needed + spare <= limit):
            return choice.without(batch_size, i), laid
        tried.append((needed, i, laid))
        say(
            f"WARNING: {layout.in_words(row.fields)} needs {_gib(needed)} a device by its compiled "
            f"step, and {_gib(spare)} to spare; there are {_gib(limit)}"
        )
    needed, i, laid = min(tried, key=lambda row: row[0])
    if messages.of_first_process(needed <= limit):  # what is to spare is assumed
        return choice.without(batch_size, i), laid
    raise errors.UserError(
        f"no layout fits into {_gib(limit)} a device for a batch of {batch_size}: the nearest, "
        f"{layout.in_words(rows[i].fields)}, needs {_gib(needed)}. Use more devices, or give less "
        "of the layout and let it be found",
        page=_PAGE,
    )


def built_first(choice: Choice, batch_size: int, run_samples: int) -> LaidOut:
    """Return the step of a batch size in its best layout, whether it fits or not."""
    return _build(choice.given, choice.ranking.by_size[batch_size][0].fields, run_samples, None)


def _build(
    given: schema.Config, fields: layout.Layout, run_samples: int, now: LaidOut | None
) -> LaidOut:
    if now is not None and layout.of(now.cfg) == fields:
        return now
    cfg = layout.with_layout(given, fields)
    mesh = meshes.make_mesh(cfg.mesh, layout.n_devices(fields))
    return LaidOut(cfg=cfg, mesh=mesh, program=step.build(cfg, mesh, run_samples))


def _compiled_bytes(
    choice: Choice,
    laid: LaidOut,
    batch_size: int,
    clock: phases.Phases,
    say: Callable[[str], None],
) -> float:
    """Return the bytes of a device that the compiled step needs; infinite where XLA gives up."""
    choice.before_compiling(laid.program, laid.cfg, batch_size)
    say(f"compiling the step for batch size {batch_size} to see whether it fits ...")
    args = step.abstract_args(laid.program, laid.cfg, batch_size)
    try:
        with clock.during(phases.COMPILE):
            return laid.program.train.compile(*args)
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        return math.inf


def _headroom(laid: LaidOut, batch_size: int, limit: int) -> float:
    """Return the bytes that must stay free, as the plan has it."""
    cfg, sizes = layout.at_batch_size(laid.cfg, batch_size), dict(laid.mesh.shape)
    placed = placement.Layout(
        sizes=sizes, n_microbatches=1, attention=laid.program.compute.attention, problems=()
    )
    return memory_model.headroom(cfg, placed, limit)


def _gib(n_bytes: float) -> str:
    return f"{n_bytes / 2**30:.1f} GiB"


def table(choice: Choice) -> list[str]:
    """Return lines on the layout of each batch size, and on why the next one lost."""
    found = choice.ranking
    if not layout.automatic(choice.given) and not choice.given.layouts:
        return list(choice.lines)
    lines = [*choice.lines, f"layouts ({found.origin}), by batch size:"]
    for size, (first, *others) in found.by_size.items():
        lines.append(f"  {size}: {layout.in_words(first.fields)}{_figures(first)}")
        if others:
            second = f"{layout.in_words(others[0].fields)}{_figures(others[0])}"
            lines.append(f"    where that does not fit: {second}")
    return lines


def _figures(row: ranking.Ranked) -> str:
    if row.step_seconds is None or row.peak_bytes is None:
        return ""
    origin = "compiled" if row.is_compiled else "closed forms"
    return f" ({row.step_seconds:.3g} s, {_gib(row.peak_bytes)}; {origin})"


def as_json(choice: Choice) -> dict[str, Any]:
    """Return the layouts for config.json and for checkpoints, which a resumed run keeps."""
    return ranking.as_json(choice.ranking)
