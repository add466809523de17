"""A report's figures (`report.build`) in words and cells, for the terminal and for the page."""

from collections.abc import Mapping
from typing import Any

GIB = 2**30
SMALL = 0.001  # of a step: collectives below are in the JSON file alone
COLLECTIVES = ("kind", "axis", "network", "count", "GB out of a GPU", "s", "exposed s")
SEARCHED = ("", "step s", "MFU", "GiB", "fits", "options")
BUFFERS = ("GiB", "shape", "made by", "source")


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


def of_collectives(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return a report's collectives as cells, with `COLLECTIVES` above them."""
    return [
        (
            one["kind"], one["axis"], one["network"], f"{one['count']:,}",
            figure(one["bytes_per_step"] / 1e9), figure(one["seconds"]), figure(one["exposed"]),
        )
        for one in found["collectives"]
    ]  # fmt: skip


def of_buffers(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return the largest arrays of a compiled step as cells, with `BUFFERS` above them."""
    return [
        (
            figure(one["n_bytes"] / GIB),
            one["shape"],
            "/".join(one["operation"].split("/")[-2:]),
            one["source"],
        )
        for one in found["compiled"]["largest_buffers"]
    ]


def of_search(rows: list[dict[str, Any]]) -> list[tuple[str, ...]]:
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


def of_assumptions(found: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """Return what a report's times rest on: name, best / expected / worst, source."""
    return [
        (name, f"{of['best']:g} / {of['expected']:g} / {of['worst']:g}", of["source"])
        for name, of in found["assumed"].items()
    ]


def network(found: Mapping[str, Any]) -> str:
    """Return the network's assumed rates, and where the GPU's figures are from."""
    network = found["network"]
    return (
        f"NVLink {network['nvlink_bandwidth'] / 1e9:g} GB/s and NIC "
        f"{network['nic_bandwidth'] / 1e9:g} GB/s a GPU each way, assumed to be reached; "
        f"{network['latency'] * 1e6:g} us to start a collective, and as much per doubling of its "
        f"group. GPU: {found['gpu']['source']}"
    )


def advice(found: Mapping[str, Any]) -> str:
    """Return what to try where a plan is a bad one, else ""."""
    waits = found["exposed_communication_seconds"] / found["step_seconds"]["expected"]
    if not found["fits"]:
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
