"""The layouts that a run may use for each of its batch sizes, best first: found, or from a file."""

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gpt3jax import errors
from gpt3jax.config import layout, schema
from gpt3jax.hardware import gpus
from gpt3jax.plan import placement, search

_KEPT = 8  # layouts of a batch size: the first, and what to take where those before do not fit
_SMALLER = 0.98  # of the memory of the layout before: another one would hardly help
NEAR = 1.03  # a batch size keeps the layout of the one before where it is at most so much slower
_PAGE = "parallelism.md#the-layout-is-found"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranked:
    """A layout for one batch size."""

    fields: layout.Layout
    step_seconds: float | None = None
    """Estimated time of a step; None for a layout that was given."""
    peak_bytes: float | None = None
    """Estimated or compiled memory of a device; None for a layout that was given."""
    is_compiled: bool = False
    """Whether both figures are of a compiled step."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ranking:
    """The layouts of a run by batch size."""

    origin: str
    """Where they are from, in words."""
    n_devices: int
    """Devices that the run has; layouts may use fewer."""
    device: str
    """Kind of the devices."""
    given: layout.Layout
    """Fields that the user gave, which all layouts have."""
    by_size: Mapping[int, Sequence[Ranked]]
    """Batch size: layouts, best first."""

    @property
    def n_used(self) -> int:
        """Devices that work; those after them idle."""
        return layout.n_devices(next(iter(self.by_size.values()))[0].fields)


def of_config(
    cfg: schema.Config,
    n_gpus: int,
    gpu: gpus.Gpu,
    network: gpus.Network,
    say: Callable[[str], None] = lambda line: None,
) -> Ranking:
    """Return the layouts of a run: those of its file, or found, or the one that is given.

    `say` gets a line where GPUs idle.

    Raises:
        UserError: as `read` and `find`; or the mesh that is given does not fit the GPUs.
    """
    if cfg.layouts:
        stored = dataclasses.replace(read(cfg.layouts, cfg, n_gpus), n_devices=n_gpus)
        if stored.n_used < n_gpus:
            say(f"{_idle(stored.n_used, n_gpus)}: layouts={cfg.layouts} has no use for them")
        return stored
    if layout.automatic(cfg):
        return find(cfg, n_gpus, gpu, network, say)
    n_used = placement.in_whole_nodes(n_gpus, network.gpus_per_node)
    if n_used < n_gpus:
        say(f"{_idle(n_used, n_gpus)}: they fill no node of {network.gpus_per_node}")
    sizes = placement.lay_out(cfg, n_used, network.gpus_per_node).sizes
    fields = layout.of(cfg) | {f"mesh.{axis}": size for axis, size in sizes.items()}
    only = given(cfg, fields, "given", gpu.name)
    return dataclasses.replace(only, n_devices=n_gpus)


def find(
    cfg: schema.Config,
    n_gpus: int,
    gpu: gpus.Gpu,
    network: gpus.Network,
    say: Callable[[str], None] = lambda line: None,
) -> Ranking:
    """Return the layouts of a config's batch sizes on so many GPUs, ranked by closed forms.

    `say` gets a line where GPUs idle.

    Raises:
        UserError: no layout is possible, or none fits.
    """
    found = all_candidates(cfg, n_gpus, gpu, network, say)
    return Ranking(
        origin="found by closed forms",
        n_devices=n_gpus,
        device=gpu.name,
        given=layout.given(cfg),
        by_size=_near_the_one_before(found),
    )


def all_candidates(
    cfg: schema.Config,
    n_gpus: int,
    gpu: gpus.Gpu,
    network: gpus.Network,
    say: Callable[[str], None] = lambda line: None,
) -> dict[int, list[search.Candidate]]:
    """Return all layouts that fit, fastest first, for each batch size of a config.

    Raises:
        UserError: as `find`.
    """
    n_used, found = _on_most(cfg, n_gpus, gpu, network)
    if n_used < n_gpus:
        higher = search.next_usable(cfg, list(found), n_gpus, network.gpus_per_node)
        say(
            f"{_idle(n_used, n_gpus)}: no mesh over more divides the batches and the model, and "
            f"fits. Counts of which none idles: {n_used}{f' and {higher}' if higher else ''}"
        )
    return found


def _on_most(
    cfg: schema.Config, n_gpus: int, gpu: gpus.Gpu, network: gpus.Network
) -> tuple[int, dict[int, list[search.Candidate]]]:
    """Return the layouts on the most GPUs on which all batch sizes fit, and how many those are."""
    sizes, failed = search.batch_sizes(cfg), []
    n_used = search.n_usable(cfg, sizes, n_gpus, network.gpus_per_node) or n_gpus
    while 2 * n_used >= n_gpus:  # on fewer GPUs a model hardly fits where it does not on these
        try:
            found = {size: search.candidates(cfg, size, n_used, gpu, network) for size in sizes}
            return n_used, found
        except errors.UserError as error:
            failed.append(error)
        n_used = search.n_usable(cfg, sizes, n_used - 1, network.gpus_per_node)
    raise failed[0]


def _idle(n_used: int, n_devices: int) -> str:
    return (
        f"WARNING: {n_devices - n_used} of {n_devices} devices idle, numbers {n_used} to "
        f"{n_devices - 1}"
    )


def _near_the_one_before(
    found: Mapping[int, Sequence[search.Candidate]],
) -> dict[int, list[Ranked]]:
    by_size: dict[int, list[Ranked]] = {}
    before: layout.Layout = {}
    for size, candidates in found.items():
        first = first_choice(candidates, before)
        by_size[size] = [as_ranked(c) for c in chain(first, candidates)]
        before = first.fields
    return by_size


def first_choice(candidates: Sequence[search.Candidate], before: layout.Layout) -> search.Candidate:
    """Return the fastest layout; or that of the batch size before, where it is near.

    A change of layout costs a move of the state, and one program more to trust.
    """
    near = (c for c in candidates if c.seconds <= NEAR * candidates[0].seconds)
    return next((c for c in near if c.fields == before), candidates[0])


def chain(
    first: search.Candidate, candidates: Sequence[search.Candidate]
) -> list[search.Candidate]:
    """Return a layout, and those to take where it does not fit: each the fastest of the smaller."""
    kept = [first]
    for candidate in candidates:
        if candidate.peak_bytes <= _SMALLER * kept[-1].peak_bytes and len(kept) < _KEPT:
            kept.append(candidate)
    return kept


def as_ranked(candidate: search.Candidate) -> Ranked:
    """Return a candidate with the figures of its closed forms."""
    return Ranked(
        fields=candidate.fields, step_seconds=candidate.seconds, peak_bytes=candidate.peak_bytes
    )


def given(cfg: schema.Config, fields: layout.Layout, origin: str, device: str) -> Ranking:
    """Return a ranking of one layout for all batch sizes."""
    only = Ranked(fields=fields)
    return Ranking(
        origin=origin,
        n_devices=layout.n_devices(fields),
        device=device,
        given=layout.given(cfg),
        by_size={size: [only] for size in search.batch_sizes(cfg)},
    )


def as_json(ranking: Ranking) -> dict[str, Any]:
    """Return the object that files and checkpoints hold; JSON's keys are texts."""
    content = dataclasses.asdict(ranking)
    return {**content, "by_size": {str(size): rows for size, rows in content["by_size"].items()}}


def from_json(content: Mapping[str, Any], source: str) -> Ranking:
    """Return the ranking of an object that `as_json` made.

    Raises:
        UserError: it is not one; the error names the source.
    """
    try:
        by_size = {
            int(size): [Ranked(**row) for row in rows] for size, rows in content["by_size"].items()
        }
        ranking = Ranking(**{**content, "by_size": by_size})
    except (TypeError, ValueError, KeyError, AttributeError) as error:
        raise errors.UserError(
            f"{source} has no layouts ({type(error).__name__}: {error}): write it with "
            "gpt3jax.plan --search --write-layouts FILE",
            page=_PAGE,
        ) from error
    all_fields = [row.fields for rows in ranking.by_size.values() for row in rows]
    for fields in all_fields:
        layout.check(fields, source)
    counts = sorted({layout.n_devices(fields) for fields in all_fields})
    if len(counts) != 1:
        raise errors.UserError(
            f"{source}: its layouts use {' and '.join(map(str, counts))} devices, and all must use "
            "as many: mesh.copies takes what is left over",
            page=_PAGE,
        )
    return ranking


def read(file: str, cfg: schema.Config, n_devices: int) -> Ranking:
    """Return the layouts of a file for the batch sizes of a config.

    Raises:
        UserError: it cannot be read, is for another number of devices, lacks a batch size, or has
            no layout with what the user gave.
    """
    try:
        content = json.loads(pathlib.Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise errors.UserError(
            f"layouts={file}: {error}: write it with gpt3jax.plan --search --write-layouts FILE",
            page=_PAGE,
        ) from error
    ranking = from_json(content, f"layouts={file}")
    if n_devices not in (ranking.n_devices, ranking.n_used):
        raise errors.UserError(
            f"layouts={file} is for {ranking.n_devices} devices, and here are {n_devices}: plan "
            f"again with --gpus={n_devices}, or leave the option out",
            page=_PAGE,
        )
    by_size = {size: _matching(ranking, cfg, size, file) for size in search.batch_sizes(cfg)}
    return dataclasses.replace(ranking, origin=file, given=layout.given(cfg), by_size=by_size)


def _matching(ranking: Ranking, cfg: schema.Config, size: int, file: str) -> list[Ranked]:
    """Return the layouts of a batch size that have what the user gave."""
    rows = ranking.by_size.get(size, ())
    if not rows:
        sizes = ", ".join(map(str, ranking.by_size))
        raise errors.UserError(
            f"layouts={file} has no layout for a batch of {size} (it has {sizes}): plan again "
            "with this recipe, or leave the option out",
            page=_PAGE,
        )
    asked = layout.given(cfg).items()
    matching = [row for row in rows if asked <= row.fields.items()]
    if not matching:
        words = ", ".join(f"{name}={value}" for name, value in asked)
        raise errors.UserError(
            f"layouts={file} has no layout for a batch of {size} with {words}, as given: leave "
            "out what is given, or the file",
            page=_PAGE,
        )
    return matching
