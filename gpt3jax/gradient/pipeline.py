"""Pipeline parallelism: layers over the `stage` axis, microbatches streaming through them.

Each of P stages holds R runs of consecutive layers, its virtual stages (Megatron's interleaved
schedule; R = 1 is the plain one). Run r of stage p is number r P + p of P R, so a microbatch goes
round the ring of stages R times. One program runs on all stages at once, manual over `stage`: a
loop over ticks, in each of which every stage takes what its neighbour made in the tick before,
runs one of its virtual stages on it, and hands it on. Embedding and head work on each stage's share
of the microbatches, so neither end of the ring waits for the other.
"""

import dataclasses
from collections.abc import Callable
from typing import TypeAlias

import jax
import jax.numpy as jnp
from jax import Array

from gpt3jax.config import schema
from gpt3jax.data import global_batch
from gpt3jax.model import dropout, gpt, loss
from gpt3jax.sharding import layouts, sequence

GradSums: TypeAlias = gpt.Block | None  # fp32, like `params.blocks`; None without a gradient
StagePass: TypeAlias = Callable[[Array, GradSums, Array, Array], gpt.Carry]
"""(x `[B, T, D]`, gradient sums, microbatch, virtual stage) -> (y `[B, T, D]`, gradient sums)."""
Carried: TypeAlias = tuple[Array, Array, GradSums]  # arriving x, belts, gradient sums


@dataclasses.dataclass(frozen=True, kw_only=True)
class Schedule:
    """Which stage does what when.

    Stage p does its u-th unit of work at tick p + u. Units go through microbatches in groups of P,
    each group through all virtual stages before the next one starts: what the last stage hands on
    then reaches stage 0 exactly when it is due there, and waits nowhere. Where microbatches do not
    fill the last group, its empty places are idle units.
    """

    n_stages: int
    virtual_stages: int
    n_microbatches: int

    @property
    def n_groups(self) -> int:
        """Groups of microbatches: G."""
        return -(-self.n_microbatches // self.n_stages)

    @property
    def n_empty(self) -> int:
        """Places of the last group that no microbatch fills."""
        return self.n_groups * self.n_stages - self.n_microbatches

    @property
    def n_ticks(self) -> int:
        """Ticks until the last stage has done its last unit."""
        n_units = self.n_groups * self.n_stages * self.virtual_stages - self.n_empty
        return n_units + self.n_stages - 1

    @property
    def bubble(self) -> float:
        """Share of the ticks in which a stage has nothing to do."""
        return 1 - self.n_microbatches * self.virtual_stages / self.n_ticks

    def unit(self, tick: Array | int, stage: Array | int) -> tuple[Array, Array]:
        """Return (microbatch, virtual stage) of a stage at a tick; idle ones repeat another."""
        u = jnp.clip(tick - stage, 0, self.n_ticks - self.n_stages)
        group, within = jnp.divmod(u, self.n_stages * self.virtual_stages)
        microbatch = group * self.n_stages + within % self.n_stages
        return jnp.minimum(microbatch, self.n_microbatches - 1), within // self.n_stages


def describe(cfg: schema.Config, mesh: jax.sharding.Mesh) -> list[str]:
    """Return a line about a run's schedule at full batch size; none without stages."""
    if mesh.shape["stage"] == 1:
        return []
    schedule = Schedule(
        n_stages=mesh.shape["stage"],
        virtual_stages=cfg.mesh.virtual_stages,
        n_microbatches=global_batch.n_microbatches(cfg, mesh, cfg.batch.global_batch_size),
    )
    return [
        f"pipeline of {schedule.n_stages} stages x {schedule.virtual_stages} virtual stages, "
        f"{schedule.n_microbatches} microbatches: idle (bubble) {schedule.bubble:.1%} of the time"
    ]


def is_in_use() -> bool:
    """Return whether the layers are cut over pipeline stages on this mesh."""
    return bool(jax.sharding.get_abstract_mesh().shape["stage"] > 1)


def loss_and_grad_sums(
    params: gpt.GPT,
    batch: global_batch.Batch,
    noise_key: Array,
    compute: gpt.Compute,
    virtual_stages: int,
) -> tuple[Array, gpt.GPT]:
    """Return this stage's share of the summed token losses, and its gradient of the weighted loss.

    It runs inside a `shard_map` that is manual over `stage`: `params.blocks` are the stage's own,
    the other parameters and the batch `[M, B, ...]` are whole. Gradients are in fp32.
    """

    def weighted(params: gpt.GPT, grad_sums: gpt.Block) -> tuple[Array, Array]:
        return _share_of_loss(params, batch, noise_key, compute, virtual_stages, grad_sums)

    # With respect to `grad_sums` it gives the gradient of `params.blocks`: see `_block_at`.
    grad = jax.value_and_grad(weighted, argnums=(0, 1), has_aux=True)
    zeros = layouts.zeros_like_params(params.blocks)
    (_, loss_sum), (grads, block_grads) = grad(params, zeros)
    grads.blocks = block_grads
    return loss_sum, layouts.constrain_like_params(grads)


def loss_sum(
    params: gpt.GPT, batch: global_batch.Batch, compute: gpt.Compute, virtual_stages: int
) -> Array:
    """Return this stage's share of the summed token losses, without dropout."""
    return _share_of_loss(params, batch, None, compute, virtual_stages, None)[1]


def _share_of_loss(
    params: gpt.GPT,
    batch: global_batch.Batch,
    noise_key: Array | None,
    compute: gpt.Compute,
    virtual_stages: int,
    grad_sums: GradSums,
) -> tuple[Array, Array]:
    """Return this stage's share of the weighted loss and of the summed token losses.

    Without `noise_key` there is no dropout. `grad_sums` are fp32 zeros like `params.blocks`.
    """
    schedule = Schedule(
        n_stages=jax.sharding.get_abstract_mesh().shape["stage"],
        virtual_stages=virtual_stages,
        n_microbatches=batch["samples"].shape[0],
    )
    own = jax.tree.map(lambda x: _own(x, schedule), batch)
    x_GBTD = _embedded(params, own, noise_key, compute)
    stage_pass = _stage_pass(params, batch, noise_key, compute, schedule)
    x_GBTD = run(schedule, x_GBTD, stage_pass, grad_sums)
    x_GBTD = jax.lax.map(lambda x_BTD: params.final_norm(x_BTD, compute), x_GBTD)
    cfg = params.model
    weighted, token_losses_BT = loss.cross_entropy(
        _joined(x_GBTD),
        params.head_VD(compute),
        _joined(own["targets"]),
        _joined(own["weights"]),
        cfg.softmax_size,
        x_GBTD.shape[0] * cfg.n_loss_chunks,
    )
    return weighted, (token_losses_BT * _joined(own["loss_mask"])).sum()


def _embedded(
    params: gpt.GPT, batch: global_batch.Batch, noise_key: Array | None, compute: gpt.Compute
) -> Array:
    """Return the embedded tokens `[G, B, T, D]` of a stage's own microbatches."""

    def embed(_: None, microbatch: global_batch.Batch) -> tuple[None, Array]:
        noise = _noise(noise_key, microbatch["samples"])
        return None, params.embed(microbatch["tokens"], microbatch["positions"], noise, compute)

    return jax.lax.scan(embed, None, batch)[1]


def run(schedule: Schedule, x_GBTD: Array, stage_pass: StagePass, grad_sums: GradSums) -> Array:
    """Send microbatches through all stages; return them where they came from, `[G, B, T, D]`.

    Stage p gives and gets microbatches p, P + p, 2 P + p, ...; what comes back in an empty place is
    meaningless, as is the x that `stage_pass` gets while the stage is idle. `stage_pass` hands its
    gradient sums on from tick to tick.

    Besides the ring, a belt of one slot a stage runs the other way. In the P ticks in which stage 0
    takes up a group, the belt brings it that group's inputs, one a tick, and stage 0 lays the
    group before, done in the same tick, in their places; after P ticks these are home.
    """
    n_stages, n_units = schedule.n_stages, schedule.n_stages * schedule.virtual_stages
    stage = jax.lax.axis_index("stage")
    forward = [(i, (i + 1) % n_stages) for i in range(n_stages)]
    backward = [(j, i) for i, j in forward]

    def turn_belt(tick: Array | int, arriving_BTD: Array, belts_GBTD: Array) -> tuple[Array, Array]:
        """Return the input of a tick, and the belts of all groups after it."""
        group, within = jnp.divmod(tick, n_units)
        slot_BTD = jax.lax.dynamic_index_in_dim(belts_GBTD, group, keepdims=False)
        x_BTD = jnp.where((stage == 0) & (within < n_stages), slot_BTD, arriving_BTD)
        moved_BTD = jnp.where(stage == 0, arriving_BTD, slot_BTD)
        moved_BTD = jax.lax.ppermute(moved_BTD, "stage", backward)
        slot_BTD = jnp.where(within < n_stages, moved_BTD, slot_BTD)
        return x_BTD, jax.lax.dynamic_update_index_in_dim(belts_GBTD, slot_BTD, group, 0)

    def step(carry: Carried, tick: Array) -> tuple[Carried, None]:
        arriving_BTD, belts_GBTD, grad_sums = carry
        x_BTD, belts_GBTD = turn_belt(tick, arriving_BTD, belts_GBTD)
        y_BTD, grad_sums = stage_pass(x_BTD, grad_sums, *schedule.unit(tick, stage))
        return (jax.lax.ppermute(y_BTD, "stage", forward), belts_GBTD, grad_sums), None

    zeros_BTD = jnp.zeros_like(x_GBTD[0])
    belts_GBTD = jnp.concatenate([x_GBTD, zeros_BTD[None]])  # the last group has outputs only
    start = zeros_BTD, belts_GBTD, grad_sums
    (arriving_BTD, belts_GBTD, _), _ = jax.lax.scan(step, start, jnp.arange(schedule.n_ticks))
    outputs_GBTD = turn_belt(schedule.n_ticks, arriving_BTD, belts_GBTD)[1][1:]
    if not schedule.n_empty:
        return outputs_GBTD
    # The belt of the last group has as many places to go as the group has empty ones.
    rest = [(i, (i - schedule.n_empty) % n_stages) for i in range(n_stages)]
    last_BTD = jax.lax.ppermute(outputs_GBTD[-1], "stage", rest)
    return outputs_GBTD.at[-1].set(last_BTD)


def _stage_pass(
    params: gpt.GPT, batch: global_batch.Batch, noise_key: Array | None, compute: gpt.Compute,
    schedule: Schedule,
) -> StagePass:  # fmt: skip
    """Return a function that runs one virtual stage of this stage on one microbatch."""
    stage = jax.lax.axis_index("stage")
    n_layers = params.model.n_layers // (schedule.n_stages * schedule.virtual_stages)
    blocks = jax.lax.stop_gradient(params.blocks)  # their gradient goes to `grad_sums`

    def stage_pass(
        x_BTD: Array, grad_sums: GradSums, microbatch: Array, virtual_stage: Array
    ) -> gpt.Carry:
        read = ("samples", "segments")
        arrays = {name: x for name, x in batch.items() if name in read}
        of_microbatch = global_batch.microbatch(arrays, microbatch)

        def block_of(layer: Array, grad_sums: GradSums) -> tuple[gpt.Block, GradSums]:
            # Leaves are [L / P, ...], or [R, L / (P R), ...].
            place = (virtual_stage, layer) if schedule.virtual_stages > 1 else (layer,)
            return _block_at(blocks, grad_sums, place)

        own_L = jnp.arange(n_layers)
        return params.run_layers(
            own_L,
            (virtual_stage * schedule.n_stages + stage) * n_layers + own_L,
            x_BTD,
            gpt.ForwardArgs(
                segments_BT=of_microbatch.get("segments"),
                noise=_noise(noise_key, of_microbatch["samples"]),
                compute=compute,
            ),
            block_of,
            grad_sums,
        )

    return stage_pass


@jax.custom_vjp
def _block_at(
    blocks: gpt.Block, grad_sums: GradSums, place: tuple[Array, ...]
) -> tuple[gpt.Block, GradSums]:
    """Return the block at a place of stacked ones, and `grad_sums` as they are.

    In the backward pass the gradient of the block is added to that of `grad_sums`, in place and in
    fp32. So the gradient with respect to the `grad_sums` that the loop over ticks starts with is
    the gradient of all blocks. Left to JAX, each tick would lay its gradients beside each other
    before it adds them, and would add them in the format of the weights, which may be 16-bit.
    """

    def part(leaf: Array) -> Array:
        shape = leaf.shape[len(place) :]
        piece = jax.lax.dynamic_slice(leaf, _start(place, shape), (1,) * len(place) + shape)
        return piece.reshape(shape)

    return jax.tree.map(part, blocks), grad_sums


def _block_at_forward(
    blocks: gpt.Block, grad_sums: GradSums, place: tuple[Array, ...]
) -> tuple[tuple[gpt.Block, GradSums], tuple[Array, ...]]:
    return _block_at(blocks, grad_sums, place), place


def _block_at_backward(
    place: tuple[Array, ...], cotangents: tuple[gpt.Block, GradSums]
) -> tuple[None, GradSums, None]:
    block_grads, grad_sums = cotangents

    def add(total: Array, part: Array) -> Array:
        start = _start(place, part.shape)
        part = part.astype(total.dtype).reshape((1,) * len(place) + part.shape)
        held = jax.lax.dynamic_slice(total, start, part.shape)
        return jax.lax.dynamic_update_slice(total, held + part, start)

    return None, layouts.constrain_like_params(jax.tree.map(add, grad_sums, block_grads)), None


_block_at.defvjp(_block_at_forward, _block_at_backward)


def _start(place: tuple[Array, ...], shape: tuple[int, ...]) -> tuple[Array | int, ...]:
    """Return where the part of a place starts, of this shape, in a stacked array."""
    return (*place, *(0 for _ in shape))


def _noise(key: Array | None, samples_B: Array) -> dropout.Noise | None:
    return None if key is None else dropout.Noise(key, samples_B)


def _own(x: Array, schedule: Schedule) -> Array:
    """[M, ...] -> [G, ...]: microbatches p, P + p, 2 P + p, ... of stage p, zeros in empty places.

    The weights of a microbatch of zeros are zero, so it adds nothing to losses and gradients.
    """
    whole = jnp.pad(x, [(0, schedule.n_empty)] + [(0, 0)] * (x.ndim - 1))
    groups = whole.reshape(-1, schedule.n_stages, *x.shape[1:])
    return jax.lax.dynamic_index_in_dim(groups, jax.lax.axis_index("stage"), 1, keepdims=False)


def _joined(x: Array) -> Array:
    """[G, B, T, ...] -> [B, G T, ...]: so the loss, chunk by chunk, sums one table gradient.

    Where the sequence is sharded, each shard joins its own part.
    """
    n_shards = sequence.context_size()
    parts = x.reshape(*x.shape[:2], n_shards, -1, *x.shape[3:])  # [G, B, C, T / C, ...]
    return jnp.moveaxis(parts, 0, 2).reshape(x.shape[1], -1, *x.shape[3:])
