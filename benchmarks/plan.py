"""Print the tables of docs/plan.md: layouts that are found, memory, published runs.

    python benchmarks/plan.py layouts [--gpus 8 64] [--recipes 345m gpt3/13b] [--rows FILE]
    python benchmarks/plan.py memory [--no-compile]
    python benchmarks/plan.py runs

It prints Markdown, and runs on a CPU. It needs the extra `plan`, except with `--no-compile`, which
prints the closed forms' figures. All of `layouts` takes hours; it keeps its rows in a file, and the
next call continues from there.
"""

import argparse
import contextlib
import io
import pathlib
import sys

from gpt3jax import errors
from gpt3jax.config import layout
from gpt3jax.plan import compiler, planning
from gpt3jax.plan import options as plan_options

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
RECIPES = ("345m", "857m", "gpt3/1_3b", "gpt3/13b", "175b")
GPUS = (8, 64, 256, 1024)
N_COMPILED = 8  # layouts of a search, which the one that is taken is compared with
FULL_BATCH = "--batch.schedule="
# What a layout below has where it says nothing else.
PLAIN = {f"mesh.{axis}": 1 for axis in layout.AXES} | {
    "mesh.virtual_stages": 1, "mesh.shard_optimizer": False, "mesh.sequence_parallel": True,
    "batch.microbatch_size": 1, "model.remat": "full", "model.n_loss_chunks": 1,
}  # fmt: skip
FSDP_TENSOR = {"mesh.fsdp": 128, "mesh.tensor": 8, "batch.microbatch_size": 12}
PIPELINE = {"mesh.data": 8, "mesh.stage": 16, "mesh.tensor": 8}
# Layouts of different kinds: recipe, GPUs, fields.
LAYOUTS = [
    ("175b", 1024, FSDP_TENSOR),
    ("175b", 1024, {**FSDP_TENSOR, "model.remat": "mlp"}),
    ("175b", 256, {"mesh.fsdp": 256, "batch.microbatch_size": 6, "model.n_loss_chunks": 8}),
    ("175b", 1024, PIPELINE),
    ("175b", 1024, {**PIPELINE, "mesh.shard_optimizer": True}),
    ("175b", 1024, {"mesh.fsdp": 512, "mesh.tensor": 2, "batch.microbatch_size": 3,
                    "model.remat": "mlp"}),
    ("gpt3/13b", 64, {"mesh.data": 8, "mesh.fsdp": 8, "mesh.shard_optimizer": True}),
]  # fmt: skip
# Published steps of 175B, each compared with a layout of ours: source, seconds, GPU, sequences of a
# batch, layout.
RUNS = [
    ("Pax, 256 H100, fsdp", 30.1, "h100", 1536, *LAYOUTS[2]),
    ("Megatron-LM, 1,024 A100, TP 8 x PP 16", 32.0, "a100", 1536, *LAYOUTS[3]),
    ("NeMo, 1,024 H100, TP 4 x PP 8 x VP 6", 8.45, "h100", 2048, "175b", 1024,
     {"mesh.data": 32, "mesh.stage": 8, "mesh.tensor": 4, "mesh.virtual_stages": 6,
      "mesh.shard_optimizer": True, "batch.microbatch_size": 4}),
]  # fmt: skip


def report(recipe, n_gpus, args, gpu="h100", **options):
    """Return the report of a plan, and print nothing."""
    config_file = str(CONFIGS / f"{recipe}.py")
    request = plan_options.Options(config=config_file, gpus=n_gpus, gpu=gpu, **options)
    with contextlib.redirect_stdout(io.StringIO()):
        return planning.plan(request, args, "")


def report_of(recipe, n_gpus, fields, *args, **options):
    """Return the report of a layout in bfloat16, with full batches from the start."""
    given = layout.options(PLAIN | fields)
    args = [FULL_BATCH, "--precision.compute-dtype=bfloat16", *args, *given]
    return report(recipe, n_gpus, args, **options)


def layouts(options):
    """Print the layout that a run takes, beside the best of a search, by recipe and GPUs.

    Each compiled row is added to the file `--rows` as it comes. Rows that the file already has are
    printed from there: remove a row to plan it again.
    """
    file = options.rows if options.compile else None
    known = {tuple(cells(row)[:2]): row for row in lines_of(file)}
    figures = "GiB | fits | step s | MFU | best of the search | step s | ratio"
    print(f"| recipe | GPUs | taken | {figures} |")
    print("|---|---|---|---|---|---|---|---|---|---|")
    for recipe in options.recipes:
        for n in options.gpus:
            row = known.get((recipe, f"{n:,}"))
            if row is None:
                row = layout_row(recipe, n, options.compile)
                if file:
                    with file.open("a") as rows:
                        rows.write(f"{row}\n")
            print(row, flush=True)


def lines_of(file):
    return file.read_text().splitlines() if file and file.exists() else []


def cells(row):
    return [cell.strip() for cell in row.strip("|").split("|")]


def layout_row(recipe, n, compile_steps):
    """Return the row of a recipe's full batch on so many GPUs, or why there is none."""
    start, args = f"| {recipe} | {n:,} |", [FULL_BATCH]
    try:
        [taken] = report(recipe, n, args, compile=compile_steps).batches
        searched = {"search": True, "n_compiled": N_COMPILED, "compile": compile_steps}
        [best] = report(recipe, n, args, **searched).batches
    except errors.UserError as error:
        reason = str(error).partition("; use more GPUs")[0].replace("|", "/")
        return f"{start} {reason} | | | | | | | |"
    return (
        f"{start} {layout.in_words(taken.layout)} | {taken.peak_bytes_per_gpu / 2**30:.1f} | "
        f"{'yes' if taken.fits else 'NO'} | {taken.step_seconds:.3g} | {taken.mfu:.1%} | "
        f"{'the same' if best.layout == taken.layout else layout.in_words(best.layout)} | "
        f"{best.step_seconds:.3g} | {taken.step_seconds / best.step_seconds:.2f} |"
    )


def memory(options):
    """Print the closed forms' peak and the states' minimum beside the compiler's."""
    print("| layout | states GiB | closed forms | compiled | error |\n|---|---|---|---|---|")
    for recipe, n, fields in LAYOUTS:
        plan = report_of(recipe, n, fields, compile=options.compile)
        peak, ours = plan.peak.peak_bytes_per_gpu, plan.peak.estimated_peak_bytes_per_gpu
        states = 16 * plan.work.parameters / n  # fp32 weights, gradients, two moments, all sharded
        print(
            f"| {recipe} on {n}: {' '.join(f'{name}={value}' for name, value in fields.items())} | "
            f"{states / 2**30:.2f} | {ours / 2**30:.2f} | {peak / 2**30:.2f} | "
            f"{ours / peak - 1:+.1%} |",
            flush=True,
        )


def runs(options):
    """Print the plan's estimates of published runs, and the parts of each (seconds)."""
    parts = ("matmul", "attention", "elementwise", "exposed")
    print(f"| run | published s | estimate s (range) | ratio | {' | '.join(parts)} |")
    print("|---|---|---|---|---|---|---|---|")
    for name, seconds, gpu, batch_size, *where in RUNS:
        batch = f"--batch.global-batch-size={batch_size}"
        time = report_of(*where, batch, gpu=gpu, compile=options.compile).time
        estimate = time.step_seconds
        seconds_of = " | ".join(f"{getattr(time.step_parts_expected, part):.2f}" for part in parts)
        print(
            f"| {name} | {seconds} | {estimate.expected:.3g} ({estimate.low:.3g} to "
            f"{estimate.high:.3g}) | {estimate.expected / seconds:.2f} | {seconds_of} |",
            flush=True,
        )


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("table", choices=["layouts", "memory", "runs"])
    parser.add_argument("--gpus", type=int, nargs="*", default=GPUS)
    parser.add_argument("--recipes", nargs="*", default=RECIPES)
    parser.add_argument("--rows", type=pathlib.Path, default=pathlib.Path("layouts.md"))
    parser.add_argument("--no-compile", dest="compile", action="store_false")
    options = parser.parse_args(args)
    missing = compiler.missing_extra() if options.compile else ""
    if missing:
        parser.error(f"{missing}; or give --no-compile")
    return options


def main(args):
    """Print the requested table."""
    options = parse(args)
    {"layouts": layouts, "memory": memory, "runs": runs}[options.table](options)


if __name__ == "__main__":
    main(sys.argv[1:])
