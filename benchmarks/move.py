"""Print what it takes to move a train state between two layouts, and back, on H100s.

    python benchmarks/move.py
    python benchmarks/move.py --recipe gpt3/13b data=4,stage=2,tensor=8,shard-optimizer fsdp=64

A layout is what options of `--mesh.` say; axes that are not named are 1. The program of each array
is compiled, and nothing runs. It prints Markdown: the memory of a GPU, bytes that leave it over
each network, and the seconds that they take by the networks' assumed rates. It needs the extra
`plan`, runs on a CPU and takes half a minute.
"""

import argparse
import collections
import functools
import math
import os
import pathlib
import sys

import jax

from gpt3jax import step
from gpt3jax.config import recipe
from gpt3jax.hardware import gpus, xla_flags
from gpt3jax.plan import compiler, hlo
from gpt3jax.sharding import meshes, moving

CONFIGS = pathlib.Path(__file__).parents[1] / "configs"
GPU = gpus.find("h100")
NETWORK = gpus.network_of(GPU)


def config_of(recipe_name, layout):
    entries = layout.split(",")
    named = [entry.partition("=")[0] for entry in entries]
    entries += [f"{axis}=1" for axis in meshes.AXES if axis not in named]
    fields = [f"--mesh.{entry}" for entry in entries]
    # The implementation is named because there is no GPU to choose one for.
    fields += ["--data.mock", "--model.attention.implementation=xla"]
    return recipe.parse([f"--config={CONFIGS / recipe_name}.py", *fields])


def sizes_of(cfg):
    return {axis: getattr(cfg.mesh, axis) for axis in meshes.AXES}


def abstract_state(cfg, devices):
    """Return the layout of a config's train state on these devices."""
    sizes = list(sizes_of(cfg).values())
    types = (jax.sharding.AxisType.Auto,) * len(sizes)
    mesh = jax.sharding.Mesh(devices.reshape(sizes), meshes.AXES, axis_types=types)
    return step.build(cfg, mesh, 1).abstract_state


@functools.cache
def compiled(program):
    traced = program.jitted.trace(program.argument)
    return traced.lower(lowering_platforms=("cuda",)).compile()


def part_bytes(state):
    """Return the bytes of a GPU's part of a state."""
    leaves = jax.tree.leaves(state)
    return sum(math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in leaves)


def peak_bytes(source, target):
    """Return the most bytes that a GPU holds while the arrays are moved one after another."""
    held = peak = part_bytes(source)
    for program in moving.programs(source, target):
        memory = compiled(program).memory_analysis()
        peak = max(peak, held + memory.output_size_in_bytes + memory.temp_size_in_bytes)
        held += memory.output_size_in_bytes - memory.argument_size_in_bytes
    return peak


def traffic(source, target, n_gpus):
    """Return the bytes that leave a GPU over each network, and the seconds of all collectives."""
    crossing, seconds = collections.Counter(), 0.0
    for program in moving.programs(source, target):
        for collective in collectives(program, n_gpus):
            network, _ = NETWORK.bandwidth(collective.group_size, collective.in_node)
            crossing[network] += collective.crossing_bytes
            seconds += NETWORK.seconds(
                collective.crossing_bytes, collective.group_size, collective.in_node
            )
    return crossing, seconds


@functools.cache
def collectives(program, n_gpus):
    parsed = hlo.parse(compiled(program).as_text())
    instructions = [part for body in parsed.computations.values() for part in body]
    axis = (("gpu", n_gpus),)
    return [hlo.collective(x, axis, NETWORK.gpus_per_node) for x in instructions if x.collective]


def row(name, source, target, n_gpus):
    n_programs = len(set(moving.programs(source, target)))
    gib = [n / 2**30 for n in (part_bytes(source), part_bytes(target), peak_bytes(source, target))]
    crossing, seconds = traffic(source, target, n_gpus)
    return (
        f"| {name} | {gib[0]:.2f} | {gib[1]:.2f} | {gib[2]:.2f} | "
        f"{crossing['NVLink'] / 1e9:.1f} | {crossing['NIC'] / 1e9:.1f} | {seconds:.2f} | "
        f"{n_programs} |"
    )


def set_environment():
    """Let XLA compile for GPUs that are not there; JAX reads this when it starts its backends."""
    jax.config.update("jax_platforms", "cpu")
    os.environ["JAX_SKIP_CUDA_CONSTRAINTS_CHECK"] = "1"
    os.environ["XLA_FLAGS"] = xla_flags.text(xla_flags.of_plan(GPU, NETWORK, 1))


def parse(args):
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("first", nargs="?", default="data=8,stage=16,tensor=8")
    parser.add_argument("second", nargs="?", default="fsdp=512,tensor=2")
    parser.add_argument("--recipe", default="175b")
    if missing := compiler.missing_extra():
        parser.error(missing)
    return parser.parse_args(args)


def main(args):
    """Print the table."""
    options = parse(args)
    set_environment()
    layouts = options.first, options.second
    cfgs = [config_of(options.recipe, layout) for layout in layouts]
    sizes = sizes_of(cfgs[0])
    mesh = compiler.target_mesh(gpus.target_text(GPU), sizes, NETWORK.gpus_per_node)
    states = [abstract_state(cfg, mesh.devices) for cfg in cfgs]
    print("| move | GiB before | after | at most | NVLink GB | NIC GB | seconds | programs |")
    print("|---|---|---|---|---|---|---|---|")
    for i, j in ((0, 1), (1, 0)):
        name = f"{layouts[i]} to {layouts[j]}"
        print(row(name, states[i], states[j], mesh.size), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
