"""The time of a compiled program: loops, branches, kernels, and collectives beside arithmetic."""

import jax
import pytest

from gpt3jax import errors
from gpt3jax.hardware import gpus
from gpt3jax.plan import hlo, timeline

import tiny

# 1 TFLOP/s, 100 GB/s of memory, 1 GB/s between 8 GPUs of a node.
RATES = timeline.Rates(
    matmul=1e12,
    matmul_8_bits=2e12,
    cudnn=1e12,
    cudnn_backward=5e11,
    triton=1e11,
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


# As XLA wraps it from 0.11 on where it reads a layer of a stack.
FUSED_PRODUCT = f"""%sliced (p: bf16[5,1000,10000], q: bf16[10000,1000]) -> bf16[1000,1000] {{
  %p = bf16[5,1000,10000]{{2,1,0}} parameter(0)
  %x = bf16[1000,10000]{{1,0}} slice(%p), slice={{[0:1], [0:1000], [0:10000]}}
  %y = bf16[10000,1000]{{1,0}} parameter(1)
  ROOT %m = {PRODUCT}
}}
"""


def walk(text):
    return timeline.walk(hlo.parse(text), AXES, RATES)


@pytest.mark.parametrize(
    "instruction",
    [
        "call(%p), runs=%called",
        "call(%p), to_apply=%called",
        "fusion(%p), kind=kLoop, calls=%called",
        "fusion(%p), kind=kLoop",
        "all-new-start(%p), calls=%called",
        'while(%p), condition=%c, body=%called, backend_config={"known_trip_count":{"n":"2"}}',
    ],
)
def test_a_computation_that_is_run_and_missing_is_an_error(instruction):
    with pytest.raises(errors.UserError, match=r"cannot read .*not (found|known).*--no-compile"):
        walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %p = bf16[4]{{0}} parameter(0)
  %a = bf16[4]{{0}} {instruction}
}}
""")


def test_collectives_of_a_loop_count_its_trips_and_name_their_axis(no_compilation_cache):
    mesh = tiny.make_mesh(data=2, tensor=4)

    def body(x):
        def add(sums, _):
            return jax.lax.psum(sums, "tensor") * 0.1, None

        return jax.lax.psum(jax.lax.scan(add, x, None, length=7)[0], "data")

    spec = jax.sharding.PartitionSpec()
    mapped = jax.shard_map(body, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    text = jax.jit(mapped).lower(jax.numpy.ones(100)).compile().as_text()
    step = timeline.walk(hlo.parse(text), dict(mesh.shape), RATES)
    assert {axis: n for (_, axis, _), n in step.count.items()} == {"tensor": 7, "data": 1}
    # Of 400 bytes an all-reduce sends 2 (n - 1) / n.
    sent = {axis: n for (_, axis, _), n in step.crossing_bytes.items()}
    assert sent == {"tensor": 7 * 600, "data": 400}


@pytest.mark.parametrize(("n_products", "exposed"), [(1, 0.03), (2, 0.01), (3, 0.0)])
def test_a_collective_is_exposed_where_arithmetic_waits_for_it(n_products, exposed):
    products = "\n".join(f"  %m{i} = {PRODUCT}" for i in range(n_products))
    step = walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %start = {GATHER}
{products}
  %done = bf16[50000000]{{0}} all-gather-done(%start)
}}
""")
    key = ("all-gather", "tensor", "NVLink")
    assert step.exposed[key] == pytest.approx(exposed, abs=1e-6)
    assert step.busy[key] == pytest.approx(0.05)
    assert step.kernels["matmul"] == pytest.approx(0.02 * n_products)
    assert step.seconds == pytest.approx(max(0.05, 0.02 * n_products), rel=1e-6)
    assert step.flops == n_products * 20e9


def test_collectives_wait_for_each_other():
    step = walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %a = {GATHER}
  %b = {GATHER}
  %done.b = bf16[50000000]{{0}} all-gather-done(%b)
  %m = {PRODUCT}
  %done.a = bf16[50000000]{{0}} all-gather-done(%a)
}}
""")
    assert step.seconds == pytest.approx(0.12, rel=1e-6)


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
    step = walk(f"""{CONDITION}
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
    assert step.seconds == pytest.approx(5 * 0.07, rel=1e-6)
    assert step.count["all-gather", "tensor", "NVLink"] == 5
    assert step.exposed["all-gather", "tensor", "NVLink"] == pytest.approx(5 * 0.03)


def test_a_loop_whose_condition_compares_what_it_carries_takes_that_many_trips():
    step = walk(f"""
%condition (p: s32[]) -> pred[] {{
  %p = (s32[], s32[], bf16[4]) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %n = s32[] get-tuple-element(%p), index=1
  ROOT %less = pred[] compare(%i, %n), direction=LT
}}

%body (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %m = {PRODUCT}
}}

ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %x = bf16[4]{{0}} parameter(0)
  %zero = s32[] constant(0)
  %end = s32[] constant(7)
  %copied = s32[] copy(%end)
  %t = (s32[], s32[], bf16[4]) tuple(%zero, %copied, %x)
  %w = (bf16[4]{{0}}) while(%t), condition=%condition, body=%body
}}
""")
    assert step.kernels["matmul"] == pytest.approx(7 * 0.02)


def test_a_loop_in_a_loop_takes_the_product_of_their_trips():
    def loop(body, n):
        known = f'{{"known_trip_count":{{"n":"{n}"}}}}'
        return f"while(%t), condition=%condition, body=%{body}, backend_config={known}"

    step = walk(f"""{CONDITION}
%inner (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %start = {GATHER}
  %m = {PRODUCT}
  %done = bf16[50000000]{{0}} all-gather-done(%start)
}}

%outer (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %t = (bf16[4]{{0}}) tuple(%p)
  %w = (bf16[4]{{0}}) {loop("inner", 3)}
  %m = {PRODUCT}
}}

ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %t = (bf16[4]{{0}}) parameter(0)
  %w = (bf16[4]{{0}}) {loop("outer", 4)}
}}
""")
    assert step.count["all-gather", "tensor", "NVLink"] == 12
    assert step.kernels["matmul"] == pytest.approx(4 * (3 + 1) * 0.02)
    assert step.seconds == pytest.approx(4 * (3 * 0.05 + 0.02), rel=1e-6)


def test_a_loop_without_an_end_is_an_error_of_one_line():
    with pytest.raises(errors.UserError, match="a loop, w, and XLA does not say") as error:
        walk("""
%condition (p: pred[]) -> pred[] {
  ROOT %c = pred[] parameter(0)
}

ENTRY %main (p: bf16[4]) -> bf16[4] {
  %t = (bf16[4]{0}) parameter(0)
  %w = (bf16[4]{0}) while(%t), condition=%condition, body=%body, backend_config={}
}
""")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "branches",
    ["branch_computations={%short, %long}", "true_computation=%long, false_computation=%short"],
)
def test_a_branch_takes_the_time_of_the_longest(branches):
    step = walk(f"""
%short (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %m = {PRODUCT}
}}

%long (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %m = {PRODUCT}
  %m2 = {PRODUCT}
}}

ENTRY %main (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %m = {PRODUCT}
  %c = bf16[4]{{0}} conditional(%p, %p, %p), {branches}
}}
""")
    assert step.seconds == pytest.approx(0.06)


def test_calls_are_walked_and_copies_run_beside_arithmetic():
    """A sort, a reduction or a fusion calls a part of its own kernel: this is not walked."""
    step = walk(f"""
%called (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %m = {PRODUCT}
}}

ENTRY %main (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %a = bf16[4]{{0}} call(%p), to_apply=%called
  %b = ((bf16[4]{{0}}), bf16[4]{{0}}) async-start(%p), calls=%called
  %b.done = bf16[4]{{0}} async-done(%b)
  %s = (bf16[25000000]{{0}}, bf16[25000000]{{0}}, u32[]) copy-start(%p)
  %s.done = bf16[25000000]{{0}} copy-done(%s)
  %w = bf16[5000000]{{0}} select-and-scatter(%p), to_apply=%called
}}
""")
    assert step.kernels["matmul"] == pytest.approx(0.04)
    assert step.kernels["elementwise"] == pytest.approx(1e-4)  # 10 MB at 100 GB/s
    assert step.seconds == pytest.approx(0.0401)


@pytest.mark.parametrize(
    ("target", "kind"),
    [
        ("__cublas$gemm", "matmul"),
        ("__cublas$lt$matmul", "matmul"),
        ("my_matmul_of_fmhaSoftmax", "elementwise"),
    ],
)
def test_products_are_those_of_cublas(target, kind):
    product = PRODUCT.replace("__cublas$lt$matmul", target)
    step = walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
{INPUTS}
  %m = {product}
}}
""")
    assert list(step.kernels) == [kind]


def test_a_workspace_is_not_moved():
    """Versions give cuBLAS 4 MiB or 32, which would be most of a small product's time."""
    step = walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %x = bf16[10,1000]{{1,0}} parameter(0)
  %y = bf16[1000,10]{{1,0}} parameter(1)
  %m = {PRODUCT.replace("bf16[1000,1000]", "bf16[10,10]").replace("s8[4]", "s8[33554432]")}
}}
""")
    assert step.seconds == pytest.approx(2 * (2 * 10_000 + 100) / 1e11)


@pytest.mark.parametrize("fusion", ["fusion", "fusion-start"])
def test_a_product_in_a_fusion_takes_what_it_takes_alone(fusion):
    """XLA's cost of the fusion does not count: its model is for kernels."""
    cost = '{"reification_cost":[{"exec_time_us":4.7e9,"name":""}]}'
    step = walk(f"""{FUSED_PRODUCT}
ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %p = bf16[5,1000,10000]{{2,1,0}} parameter(0)
  %q = bf16[10000,1000]{{1,0}} parameter(1)
  %f = bf16[1000,1000]{{1,0}} {fusion}(%p, %q), kind=kCustom, calls=%sliced, backend_config={cost}
}}
""")
    assert dict(step.kernels) == {"matmul": pytest.approx(0.02)}
    assert step.flops == 20e9


@pytest.mark.parametrize(
    "made",
    [
        "dynamic-update-slice(%stack, %part, %i, %i)",
        "dynamic-slice(%stack, %i, %i), dynamic_slice_sizes={1,1000}",
    ],
)
def test_a_copy_that_is_started_takes_the_memory_for_its_slice(made):
    """From 0.11 on: XLA gives it no cost, and its shape is that of the whole stack."""
    result = "f32[1,1000]{1,0}" if made.startswith("dynamic-slice") else "f32[50,1000]{1,0}"
    step = walk(
        f"""
%copied (stack: f32[50,1000], i: s32[], part: f32[1,1000]) -> f32[50,1000] {{
  %stack = f32[50,1000]{{1,0}} parameter(0)
  %i = s32[] parameter(1)
  %part = f32[1,1000]{{1,0}} parameter(2)
  ROOT %made = {result} {made}
}}

ENTRY %main (p: f32[50,1000]) -> f32[50,1000] {{
  %p = f32[50,1000]{{1,0}} parameter(0)
  %i = s32[] constant(0)
  %q = f32[1,1000]{{1,0}} parameter(1)
  %s = ((f32[50,1000]{{1,0}}, s32[], f32[1,1000]{{1,0}}), {result}, u32[]) \
fusion-start(%p, %i, %q), kind=kLoop, calls=%copied, backend_config={{"reification_cost":[]}}
  %done = {result} fusion-done(%s)
}}
""".replace("\\\n", "")
    )
    assert step.seconds == step.kernels["elementwise"] == pytest.approx(2 * 4000 / 1e11)


def test_kernels_that_move_data_take_xlas_cost_at_the_rate_that_is_reached():
    def fusion(costs):
        entries = ",".join(f'{{"exec_time_us":{us},"x":0,"name":"{name}"}}' for name, us in costs)
        return walk(f"""
%body (p: f32[1000]) -> f32[1000] {{
  %p = f32[1000]{{0}} parameter(0)
}}

ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %p = f32[1000]{{0}} parameter(0)
  %f = f32[1000]{{0}} fusion(%p), calls=%body, backend_config={{"reification_cost":[{entries}]}}
}}
""").kernels["elementwise"]

    assert fusion([("", 30), ("sol", 1)]) == pytest.approx(60e-6)
    assert fusion([("", 9e9), ("indexing-cost-model", 30), ("sol", 1)]) == pytest.approx(60e-6)
    assert fusion([]) == pytest.approx(4e-8)  # 4,000 bytes at 100 GB/s
    with pytest.raises(errors.UserError, match=r"f, which moves 8,000 bytes, costs 1\.5 s"):
        fusion([("", 1.5e6), ("sol", 1)])
    with pytest.raises(errors.UserError, match="f has no cost that is known, but sol, other"):
        fusion([("sol", 30), ("other", 30)])


def attention(call):
    """Walk a call of cuDNN's attention with the blanks that JAX writes into its backend_config."""
    return walk(f"""
ENTRY %main (p: bf16[4]) -> bf16[4] {{
  %q = bf16[2,64,3,16]{{3,2,1,0}} parameter(0)
  %k = bf16[2,64,3,16]{{3,2,1,0}} parameter(1)
  %a = (bf16[2,3,64,16]{{3,1,2,0}}, f32[2,3,64]{{2,1,0}}) custom-call(%q, %k), {call}
}}
""")


@pytest.mark.parametrize(
    ("target", "mask", "window", "n_flops"),
    [
        ("Softmax", "CAUSAL", 0, 2.0),
        ("Softmax", "NO_MASK", 0, 4.0),
        ("SoftmaxBackward", "CAUSAL", 0, 5.0),
        ("Softmax", "CAUSAL", 16, 1.0),  # a quarter of 64, in place of a half
        ("ScaleBiasSoftmax", "CAUSAL", 0, 2.0),  # with segments
        ("ScaleBiasSoftmaxBackward", "CAUSAL", 0, 5.0),
    ],
)
def test_attention_counts_what_its_mask_leaves(target, mask, window, n_flops):
    config_of_it = f'{{"mask_type": "{mask}", "sliding_window_length": {window}}}'
    call = f'custom_call_target="__cudnn$fmha{target}", backend_config={config_of_it}'
    assert attention(call).flops == n_flops * 2 * 3 * 64 * 64 * 16
    way = "backward" if target.endswith("Backward") else "forward"
    assert [name for name, used in hlo.fused_attention(call).items() if used] == [way]


@pytest.mark.parametrize("target", ["triton_kernel_call", "triton_kernel_call_ffi"])
@pytest.mark.parametrize(
    ("kernel", "n_products"),
    [
        ("forward", 2),
        ("backward_queries", 3),
        ("backward_keys", 4),
        ("forward_window_16", 1),  # a quarter of 64, in place of a half
    ],
)
def test_our_attention_counts_what_a_kernel_computes(target, kernel, n_products):
    call = triton_call(target, kernel)
    walked = attention(call)
    assert walked.flops == n_products * 2 * 3 * 64 * 64 * 16
    assert walked.kernels["attention"] == walked.flops / RATES.triton
    assert hlo.fused_attention(call) == {"forward": "forward" in kernel, "backward": False}


def test_our_attentions_backward_pass_needs_both_of_its_kernels():
    names = "backward_queries", "backward_keys"
    text = "".join(triton_call("triton_kernel_call", name) for name in names)
    assert hlo.fused_attention(text) == {"forward": False, "backward": True}


def triton_call(target, kernel):
    name = f"jit(step)/jvp()/triton_{kernel}/triton_kernel_call"
    return f'custom_call_target="{target}", metadata={{op_name="{name}" stack_frame_id=9}}'


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("pallas/other", "the name of the Triton kernel"),
        ("triton_other/triton_kernel_call", "arrays"),
    ],
)
def test_a_triton_kernel_that_is_not_known_is_an_error(name, message):
    with pytest.raises(errors.UserError, match=f"cannot read the step .*{message}"):
        attention(f'custom_call_target="triton_kernel_call", metadata={{op_name="jit/{name}"}}')


@pytest.mark.parametrize("config", ['"mask": "CAUSAL"', '"mask_type": "CAUSAL"'])
def test_attention_without_its_mask_or_window_is_an_error(config):
    with pytest.raises(errors.UserError, match="mask, window or 4 dimensions of the attention a"):
        attention(f'custom_call_target="__cudnn$fmhaSoftmax", backend_config={{{config}}}')
