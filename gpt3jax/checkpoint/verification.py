"""Comparing every array of a checkpoint with its digest, with the memory of one block of rows."""

from collections.abc import Iterable

from gpt3jax.checkpoint import (
    array_names,
    layer_stacking,
    metadata,
    orbax_errors,
    partial_reading,
    storage,
)


def verify(
    store: storage.Checkpoints, step: int, abstract_state: array_names.PyTree, names: Iterable[str]
) -> int:
    """Read arrays by their names and compare them; return how many the checkpoint has.

    Raises:
        DamagedError: what cannot be read, or the names of all arrays that were changed.
    """
    meta, path = store.read_meta(step), store.path(step)
    with orbax_errors.named(path):
        expected = store.read_digests(step, meta, abstract_state)
        missing = sorted(expected.keys() - {array.name for array in partial_reading.arrays(path)})
        if missing:
            raise ValueError(f"it does not have {', '.join(missing)}")
        # Orbax needs files of its own as well: it reads the smallest array.
        partial_reading.read_state(path, _smallest_alone(abstract_state, meta), meta)
    n_stacked = layer_stacking.stacked_by_name(abstract_state, meta.config_as_laid_out)
    changed = []
    for name in names:
        try:
            for _ in partial_reading.read_blocks(path, name, n_stacked[name], expected[name]):
                pass
        except metadata.ChangedError:
            changed.append(name)
    if changed:
        raise metadata.ChangedError(path, changed)
    return len(expected)


def _smallest_alone(abstract_state: array_names.PyTree, meta: metadata.Meta) -> array_names.PyTree:
    """Return the layout as written with only the smallest array in it."""
    layout = layer_stacking.as_written(abstract_state, meta.config_as_laid_out)
    names = array_names.saved_names(abstract_state, meta)
    sizes = {name: leaf.size for name, leaf in array_names.named_leaves(layout) if name in names}
    smallest = min(sizes, key=lambda name: sizes[name])
    return partial_reading.only(layout, lambda name: name == smallest)
