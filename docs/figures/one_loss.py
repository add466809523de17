"""One loss on every mesh: the 35 ways to cut 8 devices over the curve of one device.

    python docs/figures/one_loss.py [--draw]

The quickstart's recipe, made smaller, trains 60 steps on each mesh of 8 emulated CPU devices and on
one device. The text is the source of Python's own library.
"""

import itertools
import math
import pathlib
import tempfile

import measured
import style

AXES = ("data", "stage", "fsdp", "context", "tensor")
N_DEVICES = 8
N_STEPS = 60
OPTIONS = (
    "--config=configs/quickstart.py",
    "--model.n-layers=8", "--model.d-model=64", "--model.n-heads=8", "--model.vocab-size=384",
    "--batch.microbatch-size=2",
    f"--train.n-steps={N_STEPS}", "--train.eval-interval=0",
    "--checkpoint.dir=", "--log.interval=1",
)  # fmt: skip


def every_mesh():
    """Return all ways to cut the devices over the axes."""
    sizes = itertools.product((1, 2, 4, 8), repeat=len(AXES))
    return [cut for cut in sizes if math.prod(cut) == N_DEVICES]


def name_of(sizes):
    """Return the axes of a mesh that are longer than 1, as "data 2 x tensor 4"."""
    return " x ".join(f"{axis} {size}" for axis, size in zip(AXES, sizes, strict=True) if size > 1)


def measure():
    """Train on one device and on every mesh."""
    with tempfile.TemporaryDirectory() as folder:
        alone = train(pathlib.Path(folder), (1,) * len(AXES))
        meshes = {name_of(cut): train(pathlib.Path(folder), cut) for cut in every_mesh()}
    return {"options": OPTIONS, "one_device": alone, "meshes": meshes}


def train(folder, sizes):
    """Return the losses on a mesh; the first call also makes the corpus in the folder."""
    logs = folder / (name_of(sizes) or "one device")
    paths = {
        "data.paths": "corpus", "data.vocab-file": "vocab.json", "data.merge-file": "merges.txt",
        "log.dir": logs,
    }  # fmt: skip
    options = [f"--{field}={folder / path}" for field, path in paths.items()]
    options += [f"--mesh.{axis}={size}" for axis, size in zip(AXES, sizes, strict=True)]
    options += [f"--mesh.cpu-devices={math.prod(sizes)}"]
    measured.run("gpt3jax.main", *OPTIONS, *options, folder=measured.REPOSITORY)
    print(f"{logs.name}: done", flush=True)
    return measured.losses(logs)


def draw(data, folder):
    """Draw all curves, and how far each is from that of one device."""
    figure, ((curves,), (differences,)) = style.panels(2, 4.8, sharex=True, height_ratios=(3, 2))
    alone, all_losses = data["one_device"], data["meshes"].values()
    n_meshes, steps = len(all_losses), range(1, N_STEPS + 1)
    curves.plot(steps, alone, **style.RINGS, label="one device")
    # All curves at once, as the area between the lowest and the highest: a small file.
    lowest, highest = ([edge(at) for at in zip(*all_losses, strict=True)] for edge in (min, max))
    curves.fill_between(steps, lowest, highest, color=style.BLUE, label=f"{n_meshes} meshes")
    curves.legend()
    curves.set_title(f"Loss on {n_meshes} meshes of {N_DEVICES} devices and on one device")
    points = [(n, abs(ls[n - 1] - alone[n - 1])) for ls in all_losses for n in steps]
    at_zero = sum(apart == 0 for _, apart in points) / len(points)
    distinct = sorted(set(points))  # what would be drawn twice is drawn once
    differences.plot(*zip(*distinct, strict=True), ".", color=style.BLUE, markersize=4)
    differences.set_yscale("symlog", linthresh=4e-7)  # below the last bit of a loss; it shows 0
    top = max(1e-3, 2 * max(apart for _, apart in points))
    ticks = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1)
    differences.set(ylim=(-1e-7, top), yticks=[0, *(tick for tick in ticks if tick <= top)])
    differences.set_title(
        f"Absolute difference of each of the {n_meshes} from one device ({at_zero:.0%} are 0)"
    )
    differences.set_xlabel("step")
    style.save(figure, folder / "one_loss.svg", "One loss on every mesh", data["source"])


if __name__ == "__main__":
    measured.main("one_loss", measure, draw)
