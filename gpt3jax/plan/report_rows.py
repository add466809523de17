"""A report's figures in words and table cells, for the terminal and for the page."""

from gpt3jax.config import layout
from gpt3jax.plan import report, whole_run

GIB = 2**30
SMALL = 0.001  # share of a step: shorter collectives are in the JSON file alone
COLLECTIVES = ("kind", "axis", "network", "count", "GB out of a GPU", "s", "exposed s")
BATCHES = (
    "batch", "steps", "tokens", "layout", "GiB", "fits", "step s", "MFU", "tokens/s", "hours",
)  # fmt: skip
SEARCHED = ("batch", "", "layout", "step s", "MFU", "GiB", "fits", "options")
BUFFERS = ("GiB", "shape", "made by", "source")


def head(plan: report.Report) -> str:
    """Return model, GPUs, mesh and step in one paragraph."""
    mesh, step = plan.mesh, plan.step
    axes = " x ".join(f"{axis} {n}" for axis, n in mesh.items() if n > 1) or "one device"
    features = {
        f"{step.virtual_stages} virtual stages": step.virtual_stages > 1,
        "sharded optimizer": step.shard_optimizer and mesh["data"] > 1,
        "sequence parallelism": step.sequence_parallel and mesh["tensor"] > 1,
    }
    extras = ", ".join(name for name, used in features.items() if used)
    working = plan.gpus - plan.gpus_idle
    products = "layers' products in float8, " if step.matmul_dtype == "float8" else ""
    return (
        f"{plan.work.parameters:,} parameters on {working:,} x {plan.gpu.name}, mesh "
        f"{axes}{f' ({extras})' if extras else ''}. A step: "
        f"{step.global_batch_size:,} sequences of {step.seq_len:,} tokens, "
        f"{plan.n_microbatches} x {step.microbatch_size} a rank; {step.compute_dtype}, "
        f"{products}attention {plan.attention}, remat {step.remat}"
    )


def facts(plan: report.Report) -> list[tuple[str, str]]:
    """Return the figures that follow from a step's time, as (name, value)."""
    mfu = [("MFU", f"{plan.time.mfu:.1%}")]
    if plan.step.matmul_dtype != plan.step.compute_dtype:
        mfu = [
            (f"MFU in {plan.step.matmul_dtype}", f"{plan.time.mfu:.1%}"),
            (f"MFU in terms of {plan.step.compute_dtype}", f"{plan.time.mfu_in_compute_dtype:.1%}"),
        ]
    return [
        *mfu,
        ("recomputed FLOPs", f"{plan.work.recomputed_share:.1%} of the model's"),
        ("pipeline bubble", f"{plan.time.bubble:.1%}, in the parts above"),
        ("tokens/s a GPU", f"{plan.time.tokens_per_second_per_gpu:,.0f}"),
    ]


def batches(plan: report.Report) -> list[tuple[str, ...]]:
    """Return the cells of the table of batch sizes, whose head is `BATCHES`."""
    return [
        (f"{row.batch_size:,}", f"{row.steps:,}", f"{figure(row.tokens / 1e9)}B", *_batch(row))
        for row in plan.batches
    ]


def _batch(row: whole_run.Batch) -> tuple[str, ...]:
    if (
        row.layout is None or row.peak_bytes_per_gpu is None or row.step_seconds is None
        or row.mfu is None or row.tokens_per_second_per_gpu is None or row.hours is None
    ):  # fmt: skip
        return "does not divide", "", "NO", "", "", "", ""
    return (
        layout.in_words(row.layout),
        f"{row.peak_bytes_per_gpu / GIB:.1f}",
        "yes" if row.fits else "NO",
        f"{row.step_seconds:.3g}",
        f"{row.mfu:.1%}",
        f"{row.tokens_per_second_per_gpu:,.0f}",
        figure(row.hours),
    )


def run(plan: report.Report) -> str:
    """Return the length and cost of the whole run in a sentence or two."""
    run, idle = plan.run, f" ({plan.gpus_idle} idle)" if plan.gpus_idle else ""
    cost = f", cost {_large(run.cost)}" if run.cost is not None else ""
    whole = (
        f"The run: {figure(run.run_tokens / 1e9)}B tokens in {run.run_steps:,} steps, "
        f"{figure(run.run_days)} days, {_large(run.gpu_hours)} GPU-hours on {plan.gpus:,} GPUs"
        f"{idle}{cost}."
    )
    if not run.ramp_hours:
        return whole
    share = run.ramp_extra_hours / (24 * run.run_days)
    return (
        f"{whole} Batches below the full one take {figure(run.ramp_hours)} hours, "
        f"{figure(run.ramp_extra_hours)} more than their tokens would in full ones: {share:.1%} of "
        "the run."
    )


def collectives(plan: report.Report) -> list[tuple[str, ...]]:
    """Return the cells of the collectives' table, whose head is `COLLECTIVES`."""
    return [
        (
            traffic.kind, traffic.axis, traffic.network, f"{traffic.count:,}",
            figure(traffic.bytes_per_step / 1e9), figure(traffic.seconds), figure(traffic.exposed),
        )
        for traffic in plan.time.collectives
    ]  # fmt: skip


def buffers(compiled: report.CompiledStep) -> list[tuple[str, ...]]:
    """Return the cells of the largest arrays' table, whose head is `BUFFERS`."""
    return [
        (
            figure(buffer.n_bytes / GIB),
            buffer.shape,
            "/".join(buffer.operation.split("/")[-2:]),
            buffer.source,
        )
        for buffer in compiled.largest_buffers
    ]


def searched(layouts: list[report.SearchedLayout]) -> list[tuple[str, ...]]:
    """Return the cells of a search's table, whose head is `SEARCHED`."""
    return [
        (f"{row.batch_size:,}", str(i + 1), layout.in_words(row.layout), *_searched(row))
        for i, row in enumerate(layouts)
    ]


def _searched(row: report.SearchedLayout) -> tuple[str, ...]:
    if row.peak_bytes_per_gpu is None or row.mfu is None:
        return "", "", "", "not compiled", row.failed
    return (
        f"{row.step_seconds:.3g}",
        f"{row.mfu:.1%}",
        f"{row.peak_bytes_per_gpu / GIB:.1f}",
        "yes" if row.fits else "NO",
        " ".join(row.overrides),
    )


def assumptions(plan: report.Report) -> list[tuple[str, ...]]:
    """Return the assumptions behind the times: name, best / expected / worst, source."""
    return [
        (name, f"{share.best:g} / {share.expected:g} / {share.worst:g}", share.source)
        for name, share in plan.assumed.items()
    ]


def network(plan: report.Report) -> str:
    """Return the network's assumed rates, and where the GPU's figures are from."""
    network = plan.network
    return (
        f"NVLink {network.nvlink_bandwidth / 1e9:g} GB/s and NIC "
        f"{network.nic_bandwidth / 1e9:g} GB/s a GPU in each direction; "
        f"{network.latency * 1e6:g} us to start a collective, and as much again for each doubling "
        f"of its group. GPU: {plan.gpu.source}"
    )


def advice(plan: report.Report) -> str:
    """Return advice where a plan is bad, else ""."""
    if any(not row.fits and row.layout for row in plan.batches):
        return (
            "It does not fit: give fewer fields of the layout, so that others are found, or use "
            "more GPUs."
        )
    waits = plan.time.exposed_communication_seconds / plan.time.step_seconds.expected
    if waits > 0.25 and not plan.search:  # good layouts wait for less than 15%
        return (
            f"{waits:.0%} of the step waits for communication: --search compiles more layouts; "
            "fields of the layout that are given restrict it."
        )
    return ""


def figure(number: float) -> str:
    """Return a number with the digits that matter: 1,002.92, 0.109, 0.0012, 9.2e-05."""
    if number >= 1:
        return f"{number:,.2f}"
    return f"{number:.3g}" if number >= 1e-3 or number < 1e-9 else f"{number:.1e}"


def _large(number: float) -> str:
    return f"{number:,.0f}" if number >= 100 else figure(number)
