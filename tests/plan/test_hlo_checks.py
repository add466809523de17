"""A compiled step that was not read completely is refused, whichever part is missing."""

import dataclasses

import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.hardware import gpus
from gpt3jax.plan import buffer_assignment, compiler, hlo, hlo_checks, placement, time_model

import tiny

COST, IS_SYNC = '{"exec_time_us":1,"name":""}', '{"is_sync":false}'
BUFFER = buffer_assignment.Buffer(4, "f32[1]", "add", "")
COMPILED = compiler.Compiled(
    argument_bytes=3, temp_bytes=4, peak_bytes=7, attention="cudnn", largest_buffers=[BUFFER],
    fused_attention={"forward": True, "backward": True}, compile_seconds=1.0, host_bytes=0,
    versions={},
    cached=False, text=COST + IS_SYNC, program=hlo.Program("", {}),
)  # fmt: skip


def check(compiled=COMPILED, axes=None, attention=None, **of_time):
    """Check a step that has the figures of the closed forms, except for the given ones."""
    model = {"attention": attention or schema.Attention()}
    mesh = {"data": 2, **(axes or {"fsdp": 2, "tensor": 2})}
    cfg = tiny.make_config(mesh=mesh, model=model)
    layout = placement.lay_out(cfg, 8, 8)
    h100 = gpus.GPUS["h100"]
    least = time_model.estimate(cfg, layout, h100, gpus.network_of(h100), "expected")
    share = of_time.pop("share_of_flops", 1.0)
    parts = dataclasses.replace(least.parts, flops=share * least.parts.flops)
    time = dataclasses.replace(least, parts=parts, **of_time)
    hlo_checks.check(cfg, layout, compiled, time, least)


@pytest.mark.parametrize(
    "axes", [{"fsdp": 4}, {"stage": 2, "tensor": 2}, {"context": 2, "fsdp": 2}]
)
def test_what_has_all_its_parts_is_read(axes):
    check(axes=axes)
    check(axes=axes, share_of_flops=1.1)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"peak_bytes": 2}, "its peak of 2 bytes does not hold its state and batch of 3"),
        ({"argument_bytes": 0}, "its state and batch of 0"),
        ({"largest_buffers": []}, "no temporary array"),
        ({"text": IS_SYNC}, "no cost of XLA's model"),
        ({"text": COST}, "no collective says whether"),
        (
            {"fused_attention": {"forward": True, "backward": False}},
            "attention by cudnn was not found",
        ),
    ],
)
def test_a_part_that_was_not_found_is_an_error_of_one_line(wrong, message):
    with pytest.raises(
        errors.UserError, match=f"cannot read .* jax .*{message}.*--no-compile"
    ) as error:
        check(dataclasses.replace(COMPILED, **wrong))
    assert "\n" not in str(error.value) and "0.12" in str(error.value)


def test_a_step_without_cudnns_attention_needs_none_and_a_banded_one_may_do_without():
    nothing = {"forward": False, "backward": False}
    check(dataclasses.replace(COMPILED, attention="xla", fused_attention=nothing))
    banded = schema.Attention(pattern="alternating", band=4)
    check(dataclasses.replace(COMPILED, fused_attention=nothing), {"context": 2, "fsdp": 2}, banded)


@pytest.mark.parametrize("share", [0.0, 0.36, 4.0])  # 0.36: of jax 0.12 without its fused products
def test_products_that_are_not_the_models_are_an_error(share):
    with pytest.raises(errors.UserError, match="FLOPs a GPU were found, and it needs"):
        check(share_of_flops=share)


def test_an_axis_without_its_collectives_is_an_error():
    def traffic(kind, axis, n_bytes):
        return time_model.Traffic(
            kind=kind, axis=axis, count=1, bytes_per_step=n_bytes, network="", seconds=0, exposed=0
        )

    whole = [traffic("all-gather", axis, 1e9) for axis in ("data+fsdp", "tensor")]
    check(traffic=whole)
    for left in (whole[1:], [*whole[1:], traffic("all-reduce", "data+fsdp", 1e3)]):
        with pytest.raises(errors.UserError, match=r"collectives over mesh\.(data|fsdp) .* send "):
            check(traffic=left)
