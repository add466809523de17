"""Two processes save and restore: storage is read once, and what fails for one fails for both."""

import os
import socket
import subprocess
import sys

import pytest

import corpus

pytestmark = pytest.mark.slow

PROCESS = """
import shutil, sys
import importlib, time
import jax, numpy as np, tensorstore
import orbax.checkpoint as ocp
from jax.sharding import NamedSharding, PartitionSpec as P
from gpt3jax import config
from gpt3jax.checkpoint import metadata, partial_reading, storage
from gpt3jax.distributed import joining, messages
from gpt3jax.sharding import meshes, spreading
import tiny

def bytes_read():
    metrics = tensorstore.experimental_collect_matching_metrics(
        "/tensorstore/kvstore/file/bytes_read")
    return sum(value["value"] for metric in metrics for value in metric["values"])

def read(step_number):
    before = bytes_read()
    restored = store.restore(step_number, layout)
    for array, expected in zip(jax.tree.leaves(restored), jax.tree.leaves(state), strict=True):
        assert array.sharding == expected.sharding
        for one, other in zip(array.addressable_shards, expected.addressable_shards, strict=True):
            np.testing.assert_array_equal(one.data, other.data)
    return bytes_read() - before

def save(number):
    store.save(state, metadata.Meta(
        step=number, consumed_samples=1, data_order={}, config=config.schema.flatten(cfg)))

me, n, address, folder = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
joining.start(
    config.Distributed(n_processes=n, process_id=me, coordinator_address=address),
    config.Mesh(cpu_devices=2))
cfg = tiny.make_config()
mesh = meshes.make_mesh(config.Mesh(data=n, tensor=2))
specs = {"matrix": P(None, None, "tensor"), "table": P("tensor"), "vector": P()}
shapes = {"matrix": (4, 128, 256), "table": (512, 128), "vector": (2048,)}
layout = {
    name: jax.ShapeDtypeStruct(shapes[name], "float32", sharding=NamedSharding(mesh, specs[name]))
    for name in specs
}
values = {  # zeros would take no space in files
    name: np.random.default_rng(0).standard_normal(shape, "float32")
    for name, shape in shapes.items()
}
state = {
    name: jax.make_array_from_callback(
        like.shape, like.sharding, lambda index, name=name: values[name][index])
    for name, like in layout.items()
}
store = storage.Checkpoints(folder)
for number in (1, 2):
    save(number)
    assert not store.wait()
shared = read(1)
spreading.spread = lambda layout: layout
print(sum(x.nbytes for x in jax.tree.leaves(state)), shared, read(1), flush=True)
messages.meet("measured", 60)
if me == 0:
    shutil.rmtree(store.path(2) / "state" / f"ocdbt.process_{n - 1}")
messages.meet("damaged", 60)
importlib.reload(spreading)
try:
    store.restore(2, layout)
except metadata.DamagedError as error:
    print(error, flush=True)
read(1)
def fail(*args):
    raise OSError("no such disk")
for module, name in ((metadata, "read"), (partial_reading, "read_tree")):
    whole = getattr(module, name)
    if me:
        setattr(module, name, fail)
    try:
        store.restore(1, layout)
    except metadata.DamagedError as error:
        print(error, flush=True)
    setattr(module, name, whole)
read(1)
if me:
    write = ocp.future.ChainedFuture.result
    ocp.future.ChainedFuture.result = lambda *args, **given: (time.sleep(4), write(*args, **given))
store = storage.Checkpoints(f"{folder}/slow", save_timeout=2)
save(3)
print(store.wait(), flush=True)
messages.meet("end", 60)
messages.leave()
"""


@pytest.fixture(scope="module")
def outputs(tmp_path_factory):
    """Return what each of 2 processes, replicas of each other, prints."""
    folder = tmp_path_factory.mktemp("checkpoints")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    path = os.pathsep.join((str(corpus.REPOSITORY), str(corpus.REPOSITORY / "tests")))
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROCESS, str(i), "2", address, str(folder)],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env=os.environ | {"PYTHONPATH": path},
        )
        for i in range(2)
    ]  # fmt: skip
    said = [process.communicate(timeout=300) for process in processes]
    assert not any(process.returncode for process in processes), said
    return [out.splitlines()[-5:] for out, _ in said]


def test_replicas_read_each_byte_once_between_them(outputs):
    """Each its half. Besides, every process reads where in the files the arrays are."""
    numbers = [[int(word) for word in lines[0].split()] for lines in outputs]
    for n_bytes, shared, whole in numbers:
        assert 0.4 * n_bytes < shared < 0.6 * n_bytes, numbers
        assert whole > 0.85 * n_bytes, numbers


def test_what_one_process_cannot_read_is_damaged_for_all(outputs):
    """The second wrote its half, and only the second reads it."""
    for i in (1, 2, 3):  # its part of the arrays, its meta file, its digests
        first, second = (lines[i] for lines in outputs)
        assert "another process cannot read its part of it" in first
        assert "cannot be read" in second and ("no such disk" in second) == (i > 1)


def test_a_save_that_takes_too_long_names_the_option(outputs):
    """The second is slow, the first waits for it."""
    for lines in outputs:
        assert "step 3 was not saved" in lines[4]
        assert "not written within checkpoint.save_timeout=2 s: raise that" in lines[4]
