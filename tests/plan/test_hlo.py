"""Reading a compiled program: its collectives, in every spelling of their groups."""

import jax
import pytest

from gpt3jax import errors
from gpt3jax.hardware import gpus
from gpt3jax.plan import hlo


@pytest.mark.parametrize(
    ("spelling", "groups"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=[4,2]<=[8]", [[0, 1], [2, 3], [4, 5], [6, 7]]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [[0, 2, 4, 6], [1, 3, 5, 7]]),
        (
            "replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}",
            [[0, 4], [1, 5], [2, 6], [3, 7]],
        ),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
        ("replica_groups=mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
        ("source_target_pairs={{0,4},{4,0}}", [[0, 4], [4, 0]]),
        ("replica_groups={}", [list(range(8))]),
    ],
)
def test_replica_groups_in_every_spelling(spelling, groups):
    assert hlo.groups(spelling + ", dimensions={0}", 8).tolist() == groups


@pytest.mark.parametrize(
    ("op", "groups", "axes", "in_node"),
    [
        # 4 x 2 x 4 GPUs in nodes of 8: two of an axis of stride 4 share a node.
        ("all-gather", "replica_groups=mesh['a'=4,'b'=2,'c'=4] {'b'}", ("stage",), 2),
        ("all-gather", "replica_groups=mesh['a'=4,'b'=2,'c'=4] {'a'}", ("data",), 1),
        # Two axes that are not neighbours: a node has all of one.
        ("all-gather", "replica_groups=mesh['a'=4,'b'=2,'c'=4] {'a','c'}", ("data", "tensor"), 4),
        ("all-gather", "replica_groups={}", ("data", "stage", "tensor"), 8),
        # A ring of 2 stages is inside a node; a ring of replicas is not, nor is a pair 7 -> 8.
        ("collective-permute", "source_target_pairs={{0,4},{4,0}}", ("stage",), 2),
        ("collective-permute", "source_target_pairs={{0,8},{8,16},{16,0}}", ("data",), 1),
        ("collective-permute", "source_target_pairs={{3,3},{4,4},{4,8}}", ("data", "stage"), 1),
    ],
)
def test_collectives_use_the_cards_where_a_group_spans_nodes(op, groups, axes, in_node):
    start = hlo.Instruction("c", "(f32[8]{0}, f32[8]{0})", f"{op}-start", ("p",), groups)
    collective = hlo.collective(start, (("data", 4), ("stage", 2), ("tensor", 4)), 8)
    assert (collective.axes, collective.in_node) == (axes, in_node)
    network = gpus.network_of(gpus.GPUS["h100"]).bandwidth(
        collective.group_size, collective.in_node
    )[0]
    assert network == ("NVLink" if in_node == collective.group_size else "NIC")


def test_groups_in_another_spelling_do_not_count_as_all_devices():
    with pytest.raises(errors.UserError, match=f"jax {jax.__version__} .* replica_groups=v4"):
        hlo.groups(", replica_groups=v4[2,4], dimensions={0}", 8)


def collectives(text):
    program = hlo.parse(text)
    instructions = program.computations[program.entry]
    return [
        hlo.collective(i, (("data", 4), ("tensor", 2)), 8) for i in instructions if i.collective
    ]


def test_started_collectives_count_their_whole_buffer():
    text = """
ENTRY %main (p: bf16[4,2]) -> bf16[8,2] {
  %a = (bf16[4,2]{1,0}, bf16[8,2]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8]
  %r = ((f32[8,2]{1,0}), f32[4,2]{1,0}) reduce-scatter-start(%p), replica_groups=[4,2]<=[8]
  %s = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
"""
    rows = [(c.kind, c.axes, c.n_bytes, c.is_async, c.crossing_bytes) for c in collectives(text)]
    assert rows == [
        ("all-gather", ("tensor",), 32, True, 16),
        ("reduce-scatter", ("tensor",), 64, True, 32),
        ("all-reduce", ("data",), 16, False, 24),
    ]
