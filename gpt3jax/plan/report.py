"""What a plan says: as one dict (the JSON contract), and as tables on a terminal."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from rich import box, console, table

from gpt3jax import (
    batch_schedule,
    config,
    flops,
    gpus,
    remat,
    xla_flags,
)
from gpt3jax.plan import compiler, memory_model, time_model

GIB = 2**30
SMALL = 0.001  # of a step: collectives below are in the JSON file alone
COLLECTIVES = ("kind", "axis", "network", "count", "GB out of a GPU", "s", "exposed s")
SEARCHED = ("", "step s", "MFU", "GiB", "fits", "options")
BUFFERS = ("GiB", "shape", "made by", "source")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Target:
    """What is planned for."""

    gpu: gpus.Gpu
    network: gpus.Network
    price: float
    """Of a GPU-hour, in any currency; 0: unknown."""


def build(
    cfg: config.Config,
    layout: memory_model.Layout,
    target: Target,
    compiled: compiler.Compiled | None,
) -> dict[str, Any]:
    """Return all that a plan says; without `compiled` memory and collectives are estimates."""
    program = compiled.program if compiled else None
    times = {
        case: time_model.estimate(cfg, layout, target.gpu, target.network, case, program)
        for case in time_model.CASES
    }
    parts = dataclasses.asdict(times["expected"])
    memory = memory_model.memory(cfg, layout)
    estimated_peak = sum(memory.values())
    if compiled:
        memory = _with_peak(memory, compiled.peak_bytes)
    peak = sum(memory.values())
    pool, headroom = memory_model.budget(cfg, layout, target.gpu)
    tokens_a_second = cfg.batch.global_batch_size * cfg.model.seq_len / times["expected"].seconds
    return {
        "fits": peak + headroom <= pool,
        "peak_bytes_per_gpu": round(peak),
        "peak_is": "compiled" if compiled else "estimated",
        "estimated_peak_bytes_per_gpu": round(estimated_peak),
        "headroom_bytes": round(headroom),
        "budget_bytes": round(pool),
        "memory": {name: round(n) for name, n in memory.items()},
        "step_seconds": {case: time.seconds for case, time in times.items()},
        "step_parts_expected": parts,
        "exposed_communication_seconds": times["expected"].exposed,
        "mfu": _mfu(cfg, layout, target, times["expected"].seconds),
        "tokens_per_second_per_gpu": tokens_a_second / layout.n_gpus,
        "bubble": time_model.schedule(cfg, layout).bubble,
        "collectives": parts.pop("traffic"),
        "collectives_are": "compiled" if compiled else "estimated",
        **_work(cfg, layout),
        **_run(cfg, layout, target, times["expected"].seconds),
        **_compiled_part(compiled),
        "problems": list(layout.problems),
        "gpus": layout.n_gpus,
        "gpu": {"name": target.gpu.name, "source": target.gpu.source},
        "network": dataclasses.asdict(target.network),
        "mesh": layout.sizes,
        "n_microbatches": layout.n_microbatches,
        "attention": layout.attention,
        "step": _step(cfg, layout),
        "assumed": {
            name: dataclasses.asdict(of)
            for name, of in time_model.in_effect(layout, compiled is not None).items()
        },
        "versions": compiler.versions(),
    }


def _step(cfg: config.Config, layout: memory_model.Layout) -> dict[str, Any]:
    """Return what of the config, besides the mesh's sizes, decides a step's memory and time."""
    return {
        "global_batch_size": cfg.batch.global_batch_size,
        "microbatch_size": cfg.batch.microbatch_size,
        "seq_len": cfg.model.seq_len,
        "compute_dtype": cfg.precision.compute_dtype,
        "remat": remat.in_effect(cfg.model.remat, layout.sizes["stage"] > 1),
        "shard_optimizer": cfg.mesh.shard_optimizer,
        "sequence_parallel": cfg.mesh.sequence_parallel,
        "virtual_stages": cfg.mesh.virtual_stages,
    }


def _with_peak(memory: Mapping[str, float], peak: float) -> dict[str, float]:
    """Return an estimated split whose sum is the compiler's peak.

    What is exact stays; temporaries take the difference, and where they would be negative, logits,
    activations and gradients give way.
    """
    split = dict(memory)
    difference = peak - sum(split.values())
    for name in ("temporaries", "logits", "activations", "gradients"):
        new = max(0.0, split[name] + difference)
        difference -= new - split[name]
        split[name] = new
    return split


def _mfu(cfg: config.Config, layout: memory_model.Layout, target: Target, seconds: float) -> float:
    done = time_model.work(cfg, layout).model_flops
    return done / seconds / time_model.peak_flops(cfg, target.gpu)


def _work(cfg: config.Config, layout: memory_model.Layout) -> dict[str, Any]:
    done = time_model.work(cfg, layout)
    return {
        "parameters": flops.n_params(cfg.model),
        "model_flops_per_step": done.model_flops * layout.n_gpus,
        "recomputed_share": done.recomputed_flops / done.model_flops,
    }


def _run(
    cfg: config.Config, layout: memory_model.Layout, target: Target, seconds: float
) -> dict[str, Any]:
    """Return the run's length; steps of a growing batch are taken to be as efficient as full."""
    schedule = batch_schedule.from_config(cfg.batch, cfg.model.seq_len)
    n_steps, samples = schedule.end(cfg.train, cfg.model.seq_len)
    hours = samples / cfg.batch.global_batch_size * seconds / 3600
    return {
        "run_steps": n_steps,
        "run_tokens": samples * cfg.model.seq_len,
        "run_days": hours / 24,
        "gpu_hours": hours * layout.n_gpus,
        "cost": hours * layout.n_gpus * target.price if target.price else None,
    }


def _compiled_part(compiled: compiler.Compiled | None) -> dict[str, Any]:
    if compiled is None:
        return {"compile_seconds": None, "compiled": None}
    return {
        "compile_seconds": compiled.compile_seconds,
        "compiled": {
            "argument_bytes": compiled.argument_bytes,
            "temp_bytes": compiled.temp_bytes,
            "host_bytes": compiled.host_bytes,
            "largest_buffers": compiled.largest_buffers,
            "cudnn": compiled.cudnn,
            "cached": compiled.cached,
        },
    }


def show(found: Mapping[str, Any], out: console.Console) -> None:
    """Print a plan's report as tables, on a console that takes no markup.

    It has the layouts of a search under "search", of which it is the best; none without a search.
    """
    out.print(head(found))
    out.print(_memory_table(found))
    out.print(_collectives_table(found))
    if found["compiled"]:
        out.print(_buffers_table(found))
    out.print(_time_table(found))
    out.print(
        "Times are estimates: nothing ran on a GPU. Assumed, as best / expected / worst (shares):"
    )
    for row in assumption_rows(found):
        out.print(f"  {': '.join(row)}", highlight=False, soft_wrap=True)
    out.print(f"  {network_text(found)}", highlight=False, soft_wrap=True)
    if not found["search"] and (advice := _advice(found)):
        out.print(advice, soft_wrap=True)
    for problem in found["problems"]:
        out.print(f"WARNING: gpt3jax.main would refuse this run: {problem}", soft_wrap=True)


def _advice(found: Mapping[str, Any]) -> str:
    waits = found["exposed_communication_seconds"] / found["step_seconds"]["expected"]
    if not found["fits"]:
        return "It does not fit: --search looks for the fastest layout that does."
    if waits > 0.25:  # good layouts wait for less than 15%
        return (
            f"{waits:.0%} of the step waits for communication: --search looks for better layouts."
        )
    return ""


def show_search(rows: list[dict[str, Any]], out: console.Console) -> None:
    """Print the layouts that a search compiled, fastest first, with the options of each."""
    found = _table("Layouts, fastest first (estimates)", *SEARCHED[:-1])
    for *cells, _ in search_rows(rows):
        found.add_row(*cells)
    out.print(found)
    for i, row in enumerate(rows):
        failed = f" ({row['failed']})" if row["failed"] else ""
        told = f"{i + 1}: {' '.join(row['overrides'])}{failed}"
        out.print(told, highlight=False, soft_wrap=True)
    if any(row["drops_schedule"] for row in rows):
        out.print(
            "Layouts with --batch.schedule= or --batch.ramp leave out the recipe's growing batch, "
            "whose small ones do not divide over so many ranks.",
            soft_wrap=True,
        )
    if not any(row["fits"] for row in rows):
        out.print("WARNING: none of these layouts fits.")


def search_rows(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
    """Return the layouts of a search as cells, with `SEARCHED` above them."""
    return [
        (str(i + 1), "", "", "", "not compiled", row["failed"])
        if row["failed"]
        else (
            str(i + 1), f"{row['step_seconds']:.3g}", f"{row['mfu']:.1%}",
            f"{row['peak_bytes_per_gpu'] / GIB:.1f}", "yes" if row["fits"] else "NO",
            " ".join(row["overrides"]),
        )
        for i, row in enumerate(rows)
    ]  # fmt: skip


def head(found: Mapping[str, Any]) -> str:
    """Return what is planned, in one paragraph."""
    mesh, step = found["mesh"], found["step"]
    told = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"
    with_them = {
        f"{step['virtual_stages']} virtual stages": step["virtual_stages"] > 1,
        "sharded optimizer": step["shard_optimizer"] and mesh["data"] > 1,
        "sequence parallelism": step["sequence_parallel"] and mesh["tensor"] > 1,
    }
    extras = ", ".join(name for name, used in with_them.items() if used)
    return (
        f"{found['parameters']:,} parameters on {found['gpus']:,} x {found['gpu']['name']}, mesh "
        f"{told}{f' ({extras})' if extras else ''}. A step: "
        f"{step['global_batch_size']:,} sequences of {step['seq_len']:,} tokens, "
        f"{found['n_microbatches']} x {step['microbatch_size']} a rank; {step['compute_dtype']}, "
        f"attention {found['attention']}, remat {step['remat']}"
    )


def _memory_table(found: Mapping[str, Any]) -> table.Table:
    rows = _table(f"Memory of a GPU ({found['peak_is']} peak)", "", "GiB")
    for name, n_bytes in found["memory"].items():
        exact = name in ("parameters", "optimizer", "batch")
        rows.add_row(f"{name}{'' if exact else ' (estimate)'}", _figure(n_bytes / GIB))
    rows.add_section()
    rows.add_row("peak", _figure(found["peak_bytes_per_gpu"] / GIB))
    if found["compiled"]:
        closed_form = found["estimated_peak_bytes_per_gpu"] / GIB
        rows.add_row("peak by the closed forms", _figure(closed_form))
    rows.add_row(
        "headroom: cuDNN's workspace, fragmentation", f"{found['headroom_bytes'] / GIB:.2f}"
    )
    rows.add_row(
        f"budget: XLA_PYTHON_CLIENT_MEM_FRACTION={xla_flags.MEMORY_FRACTION}",
        f"{found['budget_bytes'] / GIB:.2f}",
    )
    rows.add_row("fits", "yes" if found["fits"] else "NO")
    return rows


def _collectives_table(found: Mapping[str, Any]) -> table.Table:
    title = f"Collectives of a step ({found['collectives_are']}; seconds estimated, each alone)"
    rows = _table(title, *COLLECTIVES)
    least = SMALL * found["step_seconds"]["expected"]
    for one, row in zip(found["collectives"], collective_rows(found), strict=True):
        if max(one["seconds"], one["exposed"]) >= least:
            rows.add_row(*row)
    return rows


def collective_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a report's collectives as cells, with `COLLECTIVES` above them."""
    return [
        (
            one["kind"], one["axis"], one["network"], f"{one['count']:,}",
            _figure(one["bytes_per_step"] / 1e9), _figure(one["seconds"]), _figure(one["exposed"]),
        )
        for one in found["collectives"]
    ]  # fmt: skip


def _figure(number: float) -> str:
    """Return a number with the digits that matter: 1,002.92, 0.109, 0.0012, 9.2e-05."""
    if number >= 1:
        return f"{number:,.2f}"
    return f"{number:.3g}" if number >= 1e-3 or number < 1e-9 else f"{number:.1e}"


def _buffers_table(found: Mapping[str, Any]) -> table.Table:
    rows = _table("Largest temporary arrays (compiled)", *BUFFERS)
    for row in buffer_rows(found):
        rows.add_row(*row)
    return rows


def buffer_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the largest arrays of a compiled step as cells, with `BUFFERS` above them."""
    return [
        (
            _figure(one["n_bytes"] / GIB),
            one["shape"],
            "/".join(one["operation"].split("/")[-2:]),
            one["source"],
        )
        for one in found["compiled"]["largest_buffers"]
    ]


def assumption_rows(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return what a report's times rest on: name, best / expected / worst, source."""
    return [
        (name, f"{of['best']:g} / {of['expected']:g} / {of['worst']:g}", of["source"])
        for name, of in found["assumed"].items()
    ]


def network_text(found: Mapping[str, Any]) -> str:
    """Return the network's assumed rates, and where the GPU's figures are from."""
    network = found["network"]
    return (
        f"NVLink {network['nvlink_bandwidth'] / 1e9:g} GB/s and NIC "
        f"{network['nic_bandwidth'] / 1e9:g} GB/s a GPU each way, assumed to be reached; "
        f"{network['latency'] * 1e6:g} us to start a collective, and as much per doubling of its "
        f"group. GPU: {found['gpu']['source']}"
    )


def facts(found: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what follows from a step's time, as (name, value)."""
    rows = [
        ("MFU", f"{found['mfu']:.1%}"),
        ("recomputed FLOPs", f"{found['recomputed_share']:.1%} of the model's"),
        ("pipeline bubble", f"{found['bubble']:.1%}, in the parts above"),
        ("tokens/s a GPU", f"{found['tokens_per_second_per_gpu']:,.0f}"),
        ("run", f"{found['run_tokens'] / 1e9:,.1f}B tokens, {found['run_steps']:,} steps"),
        ("", f"{found['run_days']:,.1f} days, {found['gpu_hours']:,.0f} GPU-hours"),
    ]
    if found["cost"] is not None:
        rows.append(("cost", f"{found['cost']:,.0f}"))
    return rows


def _time_table(found: Mapping[str, Any]) -> table.Table:
    rows = _table("Time (estimate)", "", "")
    low, expected, high = (found["step_seconds"][case] for case in time_model.CASES)
    rows.add_row("step", f"{expected:.3g} s ({low:.3g} to {high:.3g})")
    parts = found["step_parts_expected"]
    for name in ("matmul", "attention", "elementwise", "exposed"):
        label = {"exposed": "exposed communication"}.get(name, name)
        rows.add_row(f"  {label}", f"{parts[name]:.3g} s")
    for name, value in facts(found):
        rows.add_row(name, value)
    if found["compiled"]:
        rows.add_section()
        kernels = ", ".join(f"{name} {'yes' if used else 'no'}" for name, used
                            in found["compiled"]["cudnn"].items())  # fmt: skip
        rows.add_row("cuDNN attention in the program", kernels)
        rows.add_row("compiled in", f"{found['compile_seconds']:.1f} s")
    return rows


def _table(title: str, *columns: str) -> table.Table:
    rows = table.Table(title=title, box=box.SIMPLE, title_justify="left")
    words = {"", "kind", "axis", "network", "shape", "made by", "source"}
    for i, column in enumerate(columns):
        text = column in words and (i == 0 or bool(column))
        rows.add_column(column, justify="left" if text else "right")
    return rows
