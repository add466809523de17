"""Reading a checkpoint's folder in parts: some of its arrays, or one array in blocks of rows.

What is read is compared with its digests.
"""

import contextlib
import dataclasses
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp

from gpt3jax.checkpoint import array_blocks, array_digests, array_names, metadata, orbax_errors
from gpt3jax.sharding import layouts

NOT_READ = ocp.PLACEHOLDER
"""What stands in a state for an array that is not read: `...`."""


class Array(NamedTuple):
    """An array of a checkpoint, as its files describe it."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    n_bytes: int


def arrays(path: pathlib.Path) -> list[Array]:
    """Return the arrays of a checkpoint's folder; none is read.

    Raises:
        DamagedError: the files that describe them cannot be read.
    """
    with orbax_errors.named(path):
        tree = json.loads((path / "state" / "_METADATA").read_text())["tree_metadata"]
        leaves = [
            ("/".join(key["key"] for key in leaf["key_metadata"]), leaf["value_metadata"])
            for leaf in tree.values()
        ]
        names = sorted(name for name, value in leaves if value["value_type"] != "None")
        return [Array(name, *array_blocks.describe(path / "state", name)) for name in names]


def only(layout: array_names.PyTree, wanted: Callable[[str], bool]) -> array_names.PyTree:
    """Return a layout in which arrays whose names are not wanted are not read."""
    return jax.tree.map_with_path(
        lambda path, leaf: leaf if wanted(layouts.name_of(path)) else NOT_READ, layout
    )


def read_state(
    path: pathlib.Path, layout: array_names.PyTree, meta: metadata.Meta
) -> array_names.PyTree:
    """Return the state of a checkpoint's folder, without the arrays that are not read."""
    state = read_tree(path / "state", {"params": layout.params} if meta.only_params else layout)
    return dataclasses.replace(layout, **state) if meta.only_params else state


def read_tree(folder: pathlib.Path, layout: array_names.PyTree) -> array_names.PyTree:
    """Return the arrays of a folder in a layout: each process reads its part by itself.

    Orbax's manager would then have all processes meet, and those that could read would wait for one
    that could not.
    """
    args = ocp.args.PyTreeRestore(layout, ocp.checkpoint_utils.construct_restore_args(layout))
    with contextlib.closing(ocp.PyTreeCheckpointHandler()) as reader:
        return reader.restore(folder, args=args)


def read_blocks(
    path: pathlib.Path, name: str, n_stacked: int, expected: np.ndarray
) -> Iterator[np.ndarray]:
    """Yield an array in blocks of rows, and compare it with its digest after the last.

    Its first `n_stacked` dimensions stack layers, and become one.

    Raises:
        DamagedError: it cannot be read, or was changed since it was written.
    """
    digest = np.zeros(2, np.uint32)
    with orbax_errors.named(path):
        blocks = array_blocks.read(path / "state", name, n_stacked)
        for first, rows in blocks:
            digest += array_digests.block_digest(blocks.shape, first, rows)
            yield rows
    if (digest != expected).any():
        raise metadata.ChangedError(path, [name])


def check_digests(
    path: pathlib.Path, state: array_names.PyTree, expected: Mapping[str, np.ndarray]
) -> None:
    """Compare the arrays of a state that were read with their digests, by name.

    Raises:
        DamagedError: it names the arrays that do not match.
    """
    leaves = [
        (name, leaf) for name, leaf in array_names.named_leaves(state) if leaf is not NOT_READ
    ]
    digests = np.asarray(array_digests.digests([leaf for _, leaf in leaves]))
    changed = [
        name
        for (name, _), digest in zip(leaves, digests, strict=True)
        if (digest != expected[name]).any()
    ]
    if changed:
        raise metadata.ChangedError(path, changed)
