"""The lines that open a run's log: devices, model and length, and warnings on what may be wrong."""

import jax

from gpt3jax import optimizer, step
from gpt3jax.config import batch_schedule, schema, unused_fields
from gpt3jax.data import global_batch
from gpt3jax.gradient import pipeline
from gpt3jax.hardware import flops
from gpt3jax.model import attention, remat
from gpt3jax.plan import memory_model, placement
from gpt3jax.run import compilation_cache, layout_choice, startup, step_log


def lines(run: startup.Run) -> list[str]:
    """Return the lines that open a run's log."""
    cfg = run.cfg
    return [
        *_facts(run),
        *compilation_cache.describe(),
        *warmup_warnings(cfg.optimizer, run.n_samples),
        *pipeline.describe(cfg, run.mesh),
        *run.replicas.describe(),
        _checkpoints(run),
        *_missing_extra(run),
        *several_gpus(step.platform(run.mesh), jax.local_device_count()),
        *unused_fields.without_effect(run.choice.given),
        *layout_choice.table(run.choice),
        *beyond_the_end(cfg, run.schedule, run.end),
    ]


def _facts(run: startup.Run) -> list[str]:
    cfg, kind, has_stages = run.cfg, jax.devices()[0].device_kind, run.mesh.shape["stage"] > 1
    return [
        f"{jax.process_count()} process(es), {jax.device_count()} device(s) ({kind}), "
        f"mesh {startup.describe_mesh(run.mesh)}",
        f"{flops.n_params(cfg.model):,} parameters, "
        f"{formats(cfg.precision, step.platform(run.mesh))}, attention "
        f"{run.program.compute.attention}, remat {remat.in_effect(cfg.model.remat, has_stages)}"
        + (", weights gathered a layer ahead" if run.program.compute.prefetch else ""),
        f"{run.end.step:,} steps, {run.end.samples:,} samples of {cfg.model.seq_len} tokens; "
        f"{run.splits.description}",
    ]


def formats(precision: schema.Precision, platform: str) -> str:
    """Return the number formats of a run in words."""
    if precision.matmul_dtype != "float8":
        return precision.compute_dtype
    ends = f" but for {precision.end_layers} layers at either end" if precision.end_layers else ""
    how = " (emulated, slowly: for tests)" if platform == "cpu" else "; MFU is of its peak"
    return f"{precision.compute_dtype}, layers' products in float8{ends}{how}"


def _checkpoints(run: startup.Run) -> str:
    if run.store is None:
        return "WARNING: checkpoint.dir is empty: nothing will be saved"
    leaves, seconds = jax.tree.leaves(run.program.abstract_state), run.cfg.checkpoint.save_timeout
    size = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves) / 1e9
    return (
        f"checkpoints of {size:.4g} GB, each to be written within {seconds} s "
        f"(checkpoint.save_timeout), which takes {size / seconds:.3g} GB/s"
    )


def _missing_extra(run: startup.Run) -> list[str]:
    model, dtype = run.cfg.model, run.cfg.precision.compute_dtype
    platform, n_shards = step.platform(run.mesh), run.mesh.shape["context"]
    line = attention.missing_extra(model, dtype, platform, n_shards)
    return [f"WARNING: {line}"] if line else []


def several_gpus(platform: str, n_devices: int) -> list[str]:
    """Return a line if this process has several GPUs."""
    if platform == "cpu" or n_devices == 1:
        return []
    return [
        f"WARNING: one process has {n_devices} GPUs, and may hang (docs/launching.md): start one "
        "for each with a launcher, or python -m gpt3jax.distributed.launch gpt3jax.main ..."
    ]


def warmup_warnings(o: schema.Optimizer, run_samples: int) -> list[str]:
    """Return a line if a run ends before its warm-up, as a short trial of a recipe does."""
    warmup, _ = o.schedule(run_samples)
    if warmup <= run_samples:
        return []
    last = optimizer.learning_rate(o, run_samples, run_samples)
    return [
        f"WARNING: the warm-up of {int(warmup):,} samples is longer than the run of "
        f"{run_samples:,}: the learning rate only rises, to {last:.6g} where optimizer.peak_lr is "
        f"{o.peak_lr:g}"
    ]


def beyond_the_end(
    cfg: schema.Config, schedule: batch_schedule.BatchSchedule, end: step_log.Position
) -> list[str]:
    """Return a line for each field that would take effect only after the end of the run."""
    fields, faults = [], cfg.faults
    if cfg.log.profile_steps[0] > end.step:
        fields.append(f"log.profile_steps={' '.join(map(str, cfg.log.profile_steps))}")
    if cfg.log.profile_memory > end.step:
        fields.append(f"log.profile_memory={cfg.log.profile_memory}")
    if schedule.stages[-1][0] >= end.samples:
        first, size = schedule.stages[-1]
        fields.append(f"the batch of {size} from sample {first} on (batch.schedule or batch.ramp)")
    if faults.spike != "off" and faults.spike_window + 2 > end.step:
        fields.append(f"faults.spike_window={faults.spike_window} (faults.spike={faults.spike})")
    where = f"the run ends at step {end.step}, sample {end.samples}"
    return [f"WARNING: {field} has no effect: {where}" for field in fields]


def step_bytes(
    cfg: schema.Config, mesh: jax.sharding.Mesh, attention: str, limit: int | None
) -> float:
    """Return the bytes of a device that a full step needs, by the plan's closed forms.

    The plan's headroom in the bytes that a device offers (`limit`, if known) is included.
    """
    full = cfg.batch.global_batch_size
    layout = placement.Layout(
        sizes=dict(mesh.shape),
        n_microbatches=max(global_batch.n_microbatches(cfg, mesh, full), 1),
        attention=attention,
        problems=(),
    )
    return sum(memory_model.memory(cfg, layout).values()) + memory_model.headroom(
        cfg, layout, limit or 0
    )
