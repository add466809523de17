"""Reading a compiled program: its collectives, its timeline, its largest arrays."""

import jax
import pytest

from gpt3jax import gpus
from gpt3jax.plan import buffers, hlo, timeline

import tiny

# 1 TFLOP/s, 100 GB/s of memory, 1 GB/s between 8 GPUs of a node.
RATES = timeline.Rates(
    matmul=1e12,
    attention=1e12,
    memory=1e11,
    memory_peak=2e11,
    network=gpus.Network(gpus_per_node=8, nvlink_bandwidth=1e9, nic_bandwidth=1e8, latency=1e-12),
)
AXES = {"data": 4, "tensor": 2}
# An all-gather of 100 MB, 50 of which leave a GPU: 50 ms.
GATHER = "(bf16[25000000]{0}, bf16[50000000]{0}) all-gather-start(%p), replica_groups=[4,2]<=[8]"
# 2 x 1000 x 1000 x 10000 = 20 GFLOP: 20 ms.
PRODUCT = (
    '(bf16[1000,1000]{1,0}, s8[4]{0}) custom-call(%x, %y), custom_call_target="__cublas$lt$matmul",'
    ' backend_config={"dot_dimension_numbers":{"lhs_contracting_dimensions":["1"]}}'
)
INPUTS = """  %p = bf16[25000000]{0} parameter(0)
  %x = bf16[1000,10000]{1,0} parameter(1)
  %y = bf16[10000,1000]{1,0} parameter(2)"""


def walk(text):
    return timeline.walk(hlo.parse(text), AXES, RATES)


@pytest.mark.parametrize(
    ("spelling", "members"),
    [
        ("replica_groups={{0,2},{1,3},{4,6},{5,7}}", [0, 2]),
        ("replica_groups=[4,2]<=[8]", [0, 1]),
        ("replica_groups=[2,4]<=[4,2]T(1,0)", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2] {'a'}", [0, 2, 4, 6]),
        ("replica_groups=mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", [0, 4]),
        ("replica_groups=mesh['a'=8] {'a':(2)2}", [0, 2]),
        ("source_target_pairs={{0,4},{4,0}}", [0, 4]),
        ("replica_groups={}", list(range(8))),
    ],
)
def test_replica_groups_in_every_spelling(spelling, members):
    assert hlo._first_group(spelling + ", dimensions={0}", 8).tolist() == members


def collectives(text):
    program = hlo.parse(text)
    instructions = program.computations[program.entry]
    return [hlo.collective(one, tuple(AXES.items())) for one in instructions if one.collective]


def test_started_collectives_count_their_whole_buffer():
    text = """
ENTRY %main (p: bf16[4,2]) -> bf16[8,2] {
  %a = (bf16[4,2]{1,0}, bf16[8,2]{1,0}) all-gather-start(%p), replica_groups=[4,2]<=[8]
  %r = ((f32[8,2]{1,0}), f32[4,2]{1,0}) reduce-scatter-start(%p), replica_groups=[4,2]<=[8]
  %s = f32[4]{0} all-reduce(%p), replica_groups=[2,4]<=[4,2]T(1,0), to_apply=%add
}
"""
    found = collectives(text)
    got = [(c.kind, c.axes, c.n_bytes, c.is_async, c.crossing_bytes) for c in found]
    assert got == [
        ("all-gather", ("tensor",), 32, True, 16),
        ("reduce-scatter", ("tensor",), 64, True, 32),
        ("all-reduce", ("data",), 16, False, 24),
    ]


def test_collectives_of_a_loop_count_its_trips_and_name_their_axis(no_compilation_cache):
    mesh = tiny.make_mesh(data=2, tensor=4)

    def body(x):
        def add(sums, _):
            return jax.lax.psum(sums, "tensor") * 0.1, None

        return jax.lax.psum(jax.lax.scan(add, x, None, length=7)[0], "data")

    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jax.numpy.ones(100)).compile().as_text()
    found = timeline.walk(hlo.parse(text), dict(mesh.shape), RATES)
    assert {axis: n for (_, axis, _), n in found.count.items()} == {"tensor": 7, "data": 1}
    # Of 400 bytes an all-reduce sends 2 (n - 1) / n.
    sent = {axis: n for (_, axis, _), n in found.crossing_bytes.items()}
    assert sent == {"tensor": 7 * 600, "data": 400}


@pytest.mark.parametrize(("n_products", "exposed"), [(1, 0.03), (2, 0.01), (3, 0.0)])
def test_a_collective_is_exposed_where_arithmetic_waits_for_it(n_products, exposed):
    products = "\n".join(f"  %m{i} = {PRODUCT}" for i in range(n_products))
    found = walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %start = {GATHER}
{products}
  %done = bf16[50000000]{{0}} all-gather-done(%start)
}}
""")
    key = ("all-gather", "tensor", "NVLink")
    assert found.exposed[key] == pytest.approx(exposed, abs=1e-6)
    assert found.busy[key] == pytest.approx(0.05)
    assert found.kernels["matmul"] == pytest.approx(0.02 * n_products)
    assert found.seconds == pytest.approx(max(0.05, 0.02 * n_products), rel=1e-6)
    assert found.flops == n_products * 20e9


def test_collectives_wait_for_each_other():
    found = walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %a = {GATHER}
  %b = {GATHER}
  %done.b = bf16[50000000]{{0}} all-gather-done(%b)
  %m = {PRODUCT}
  %done.a = bf16[50000000]{{0}} all-gather-done(%a)
}}
""")
    assert found.seconds == pytest.approx(0.12, rel=1e-6)


CONDITION = """
%compare (i: s32[]) -> pred[] {
  %n = s32[] constant(5)
  ROOT %less = pred[] compare(%i, %n), direction=LT
}

%condition (p: s32[]) -> pred[] {
  ROOT %c = pred[] fusion(%p), kind=kLoop, calls=%compare
}
"""


@pytest.mark.parametrize("known", ['{"known_trip_count":{"n":"5"}}', "{}"])
def test_a_loop_takes_its_trips_and_a_gather_of_one_may_hide_in_the_next(known):
    found = walk(f"""{CONDITION}
%body (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %m = {PRODUCT}
  %start = {GATHER}
  %m2 = {PRODUCT}
  %done = bf16[50000000]{{0}} all-gather-done(%start)
}}

ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %t = (bf16[4]{{0}}) parameter(0)
  %w = (bf16[4]{{0}}) while(%t), condition=%condition, body=%body, backend_config={known}
}}
""")
    assert found.seconds == pytest.approx(5 * 0.07, rel=1e-6)
    assert found.count["all-gather", "tensor", "NVLink"] == 5
    assert found.exposed["all-gather", "tensor", "NVLink"] == pytest.approx(5 * 0.03)


def test_kernels_that_move_data_take_xlas_cost_at_the_rate_that_is_reached():
    def fusion(costs):
        entries = ",".join(f'{{"exec_time_us":{us},"x":0,"name":"{name}"}}' for name, us in costs)
        return walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %p = f32[1000]{{0}} parameter(0)
  %f = f32[1000]{{0}} fusion(%p), calls=%body, backend_config={{"reification_cost":[{entries}]}}
}}
""").kernels["elementwise"]

    assert fusion([("", 30), ("sol", 1)]) == pytest.approx(60e-6)
    assert fusion([("", 9e9), ("indexing-cost-model", 30), ("sol", 1)]) == pytest.approx(60e-6)
    assert fusion([]) == pytest.approx(4e-8)  # 4,000 bytes at 100 GB/s


@pytest.mark.parametrize(
    ("target", "mask", "n_flops"),
    [("", "CAUSAL", 2.0), ("", "NO_MASK", 4.0), ("Backward", "CAUSAL", 5.0)],
)
def test_attention_counts_what_its_mask_leaves(target, mask, n_flops):
    found = walk(
        f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %q = bf16[2,64,3,16]{{3,2,1,0}} parameter(0)
  %k = bf16[2,64,3,16]{{3,2,1,0}} parameter(1)
  %a = (bf16[2,3,64,16]{{3,1,2,0}}, f32[2,3,64]{{2,1,0}}) custom-call(%q, %k), \
custom_call_target="__cudnn$fmhaSoftmax{target}", backend_config={{"mask_type":"{mask}"}}
}}
""".replace("\\\n", "")
    )
    assert found.flops == n_flops * 2 * 3 * 64 * 64 * 16


def test_largest_arrays_share_no_memory_and_name_their_source():
    assignment = """BufferAssignment:
allocation 7: size 900, preallocated-temp:
 value: <1 big @0> (size=400,offset=0): f32[100]{0}
 value: <2 same.place @0> (size=300,offset=100): f32[75]{0}
 value: <3 pair{1} @0> (size=200,offset=400): bf16[100]{0}

Total bytes used: 900
"""
    text = """HloModule m

FileNames
1 "/site-packages/jax/x.py"
2 "/here/gpt3jax/model.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=12 end_line=12 column=1 end_column=2}
2 {file_name_id=1 function_name_id=1 line=3 end_line=3 column=1 end_column=2}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

ENTRY %main (p: f32[4]) -> f32[4] {
  %big = f32[100]{0} add(%p, %p), metadata={op_name="jit(f)/add" stack_frame_id=2}
  %same.place = f32[75]{0} add(%p, %p)
  %pair = (f32[4]{0}, bf16[100]{0}) fusion(%p), calls=%c
}
"""
    found = buffers.largest(assignment, text)
    assert [(one.n_bytes, one.shape, one.operation, one.source) for one in found] == [
        (400, "f32[100]", "jit(f)/add", "gpt3jax/model.py:12"),
        (200, "bf16[100]", "fusion", ""),
    ]
