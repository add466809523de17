"""Closed forms of the communication that no arithmetic hides.

Without stages it follows from where a layer starts the transfers over `fsdp` and where it waits for
them (`prefetch`'s windows). Other shares are fitted to steps compiled for H100s.
"""

import dataclasses

from gpt3jax.config import schema
from gpt3jax.hardware import gpus
from gpt3jax.model import remat
from gpt3jax.plan import communication, placement


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSeconds:
    """Seconds of the arithmetic of one layer on one microbatch."""

    products: float
    """Of the forward pass."""
    attention: float
    """Forward and backward, XLA's with its elementwise work."""
    elementwise: float
    """Forward and backward, the rest."""


@dataclasses.dataclass(frozen=True)
class _Window:
    """Transfers over `fsdp`, one after the other, and the arithmetic beside them.

    Matrices are counted in twelfths of a layer's: QKV 3, the projection 1, each of the MLP 4.
    """

    gathered: tuple[int, ...]
    added: int
    products: int
    """Those of weights' gradients count where they end the window: XLA may run others elsewhere."""
    attention: float = 0.0
    """Share of attention, of whose 7 products the forward pass makes 2."""
    has_small: bool = False
    """Gradients of norms and biases are added up too, some of them over `tensor` as well."""


# `gpt._FORWARD`, `_BACKWARD` and `_BACKWARD_WITH_HIDDEN`.
_FORWARD = (
    _Window((3,), 0, 3), _Window((1,), 0, 1, 2 / 7), _Window((4,), 0, 4), _Window((4,), 0, 4),
)  # fmt: skip
_BACKWARD = (
    _Window((4,), 0, 4), _Window((4,), 4, 4), _Window((3, 1), 0, 4, has_small=True),
    _Window((), 4, 1 + 4, 5 / 7), _Window((), 4, 3),
)  # fmt: skip
_BACKWARD_WITH_HIDDEN = (
    _Window((4, 4), 0, 4), _Window((3, 1), 0, 4, has_small=True), _Window((), 8, 1 + 4, 5 / 7),
    _Window((), 4, 3),
)  # fmt: skip
_ELEMENTWISE = 0.06  # share of a layer's elementwise work in a window (fitted)
_TABLE = 0.3  # exposed share of the transfers of the vocabulary's table over `fsdp` (fitted)

# Exposed shares in a pipeline's ticks (fitted): axis, kind, share, share where `fsdp` is in use.
_IN_TICKS = {
    ("stage", "collective-permute"): (0.37, 0.6),
    ("tensor", "all-gather"): (0.2, 0.45),
    ("tensor", "reduce-scatter"): (0.5, 0.67),
    ("fsdp", "all-gather"): (0.0, 0.37),
    ("fsdp", "reduce-scatter"): (0.0, 0.05),
    ("fsdp", "all-reduce"): (0.0, 0.0),
}
_JOINED = 30e6  # bytes of a layer's scattered gradients that XLA joins to one, which nothing hides


def shares(
    needed: list[communication.Needed],
    cfg: schema.Config,
    layout: placement.Layout,
    network: gpus.Network,
    layer: LayerSeconds,
) -> dict[tuple[str, str], float]:
    """Return the exposed share of each axis's collectives of a kind: (axis, kind) -> share.

    Sums over `data` and those of the table over `stage` come after all arithmetic. Attention waits
    for keys and values over `context`.
    """
    exposed = {(row.axis, row.kind): 1.0 for row in needed}
    if layout.sizes["stage"] > 1:
        uses_fsdp = layout.sizes["fsdp"] > 1
        fitted = {key: both[uses_fsdp] for key, both in _IN_TICKS.items() if key in exposed}
        if communication.layer_gradients(cfg, layout) / layout.sizes["fsdp"] < _JOINED:
            fitted.pop(("fsdp", "reduce-scatter"), None)
        return exposed | fitted
    rows = [row for row in needed if row.axis == "fsdp"]
    if rows:
        alone = sum(row.count * _seconds(row, layout, network) for row in rows)
        share = min(1.0, _fsdp_seconds(cfg, layout, network, layer) / alone)
        exposed |= {(row.axis, row.kind): share for row in rows}
    for row in needed:
        if row.axis == "tensor":
            seconds = _seconds(row, layout, network)
            exposed[row.axis, row.kind] = _tensor_share(row.kind, cfg, layout, layer, seconds)
    return exposed


def _tensor_share(
    kind: str, cfg: schema.Config, layout: placement.Layout, layer: LayerSeconds, seconds: float
) -> float:
    """Return the exposed share of the activations' transfers over `tensor`, which take so long.

    On the way forward, and where a layer runs again as a whole, nothing hides them; on the way back
    the products of weights' gradients do. Without windows for weights XLA hides half of the others.
    """
    n_bare, beside = 2, [4, 3]  # products beside the sums: the MLP's, QKV
    if kind == "all-gather":
        beside = [4, 1]  # the MLP's, the projection
        if cfg.model.remat in ("dots", "mlp", "residual"):  # gathered again, one before all work
            n_bare, beside = 3, [4, 1, 4]
    if cfg.model.remat == "full":
        n_bare += 2 if kind == "all-gather" else 1
    if layout.sizes["fsdp"] == 1:
        beside += [4] * (n_bare // 2)
        n_bare -= n_bare // 2
    twelfth = layer.products / 12
    waits = n_bare * seconds + sum(max(0.0, seconds - n * twelfth) for n in beside)
    return waits / (seconds * (n_bare + len(beside)))


def _fsdp_seconds(
    cfg: schema.Config, layout: placement.Layout, network: gpus.Network, layer: LayerSeconds
) -> float:
    """Return the exposed seconds of a step's transfers over `fsdp`, without stages."""
    hidden_is_saved = "hidden" in remat.SAVED[cfg.model.remat]
    windows = (*_FORWARD, *(_BACKWARD_WITH_HIDDEN if hidden_is_saved else _BACKWARD))
    of_layer = sum(_window_seconds(window, cfg, layout, network, layer) for window in windows)
    of_table = sum(
        row.count * _seconds(row, layout, network) for row in communication.of_table(cfg, layout)
    )
    return communication.layer_passes(cfg, layout) * of_layer + _TABLE * of_table


def _window_seconds(
    window: _Window,
    cfg: schema.Config,
    layout: placement.Layout,
    network: gpus.Network,
    layer: LayerSeconds,
) -> float:
    """Return the time that a window's transfers take longer than the arithmetic beside them."""
    weights = communication.layer_weights(cfg, layout) / 12
    transfers = [("all-gather", n * weights) for n in window.gathered]
    if window.added:
        gradients = communication.layer_gradients(cfg, layout) / 12
        transfers.append(("reduce-scatter", window.added * gradients))
    if window.has_small:
        transfers += [("all-reduce", 0.0)] * (1 + (layout.sizes["tensor"] > 1))
    needed = [communication.Needed(kind, "fsdp", 1, n_bytes) for kind, n_bytes in transfers]
    arithmetic = (
        window.products / 12 * layer.products
        + window.attention * layer.attention
        + _ELEMENTWISE * layer.elementwise
    )
    return max(0.0, sum(_seconds(row, layout, network) for row in needed) - arithmetic)


def _seconds(row: communication.Needed, layout: placement.Layout, network: gpus.Network) -> float:
    """Return the seconds of one execution of a collective alone."""
    each = communication.collective(row.kind, row.axis, row.n_bytes, layout, network)
    return network.seconds(each.crossing_bytes, each.group_size, each.in_node)
