"""A report's figures in words and table cells, for the terminal and for the page."""

from gpt3jax.plan import report

GIB = 2**30
SMALL = 0.001  # share of a step: shorter collectives are in the JSON file alone
COLLECTIVES = ("kind", "axis", "network", "count", "GB out of a GPU", "s", "exposed s")
SEARCHED = ("", "step s", "MFU", "GiB", "fits", "options")
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
    return (
        f"{plan.work.parameters:,} parameters on {plan.gpus:,} x {plan.gpu.name}, mesh "
        f"{axes}{f' ({extras})' if extras else ''}. A step: "
        f"{step.global_batch_size:,} sequences of {step.seq_len:,} tokens, "
        f"{plan.n_microbatches} x {step.microbatch_size} a rank; {step.compute_dtype}, "
        f"attention {plan.attention}, remat {step.remat}"
    )


def facts(plan: report.Report) -> list[tuple[str, str]]:
    """Return the figures that follow from a step's time, as (name, value)."""
    run = plan.run
    rows = [
        ("MFU", f"{plan.time.mfu:.1%}"),
        ("recomputed FLOPs", f"{plan.work.recomputed_share:.1%} of the model's"),
        ("pipeline bubble", f"{plan.time.bubble:.1%}, in the parts above"),
        ("tokens/s a GPU", f"{plan.time.tokens_per_second_per_gpu:,.0f}"),
        ("run", f"{run.run_tokens / 1e9:,.1f}B tokens, {run.run_steps:,} steps"),
        ("", f"{run.run_days:,.1f} days, {run.gpu_hours:,.0f} GPU-hours"),
    ]
    if run.cost is not None:
        rows.append(("cost", f"{run.cost:,.0f}"))
    return rows


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
    return [(str(i + 1), *_searched(layout)) for i, layout in enumerate(layouts)]


def _searched(layout: report.SearchedLayout) -> tuple[str, ...]:
    if layout.peak_bytes_per_gpu is None or layout.mfu is None:
        return "", "", "", "not compiled", layout.failed
    return (
        f"{layout.step_seconds:.3g}",
        f"{layout.mfu:.1%}",
        f"{layout.peak_bytes_per_gpu / GIB:.1f}",
        "yes" if layout.fits else "NO",
        " ".join(layout.overrides),
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
    waits = plan.time.exposed_communication_seconds / plan.time.step_seconds.expected
    if not plan.peak.fits:
        return "It does not fit: --search looks for the fastest layout that does."
    if waits > 0.25:  # good layouts wait for less than 15%
        return (
            f"{waits:.0%} of the step waits for communication: --search looks for better layouts."
        )
    return ""


def figure(number: float) -> str:
    """Return a number with the digits that matter: 1,002.92, 0.109, 0.0012, 9.2e-05."""
    if number >= 1:
        return f"{number:,.2f}"
    return f"{number:.3g}" if number >= 1e-3 or number < 1e-9 else f"{number:.1e}"
