"""The compiling process and its cache; small steps compiled for H100s, and read."""

import collections
import dataclasses
import gzip
import json
import pathlib
import re
import subprocess
import tempfile

import pytest

from gpt3jax import errors
from gpt3jax.config import recipe
from gpt3jax.hardware import gpus
from gpt3jax.plan import __main__ as plan
from gpt3jax.plan import compiler, hlo, placement, planning, step_report, time_model, timeline
from gpt3jax.plan import options as plan_options

import documents

compiles = pytest.mark.skipif(bool(compiler.missing_extra()), reason="needs the extra plan")


def compile_step(recipe_file, *options, gpus_per_node=8):
    """Compile the step of a small recipe on 8 A100."""
    args = [f"--config={recipe_file}", "--data.mock", *options]
    gpu = gpus.GPUS["a100"]
    network = gpus.network_of(gpu, gpus_per_node)
    sizes = {"copies": 1, "data": 2, "stage": 1, "fsdp": 2, "context": 1, "tensor": 2}
    return compiler.compile_step(recipe.parse(args), args, sizes, gpu, network)


@pytest.fixture
def compile_small(recipe_file, fake_step, monkeypatch):
    """Return a function as `compile_step`, whose compiling process answers at once.

    It returns the variables of each process.
    """

    def call(*options, beside=lambda env: None, **network):
        environments = []

        def answer(_, *, input, env, **options):
            environments.append(env)
            beside(env)
            content = {**vars(fake_step(7)), "hlo": fake_step(7).text}
            for name in ("text", "program", "fused_attention", "cached"):
                del content[name]
            file = pathlib.Path(json.loads(input)["out"])
            file.write_bytes(gzip.compress(json.dumps(content).encode()))
            return subprocess.CompletedProcess([], 0)

        monkeypatch.setattr(subprocess, "run", answer)
        step = compile_step(recipe_file, *options, **network)
        assert step.peak_bytes == 7 and step.cached != bool(environments)
        return environments

    return call


def test_a_step_is_compiled_again_where_the_program_is_another(
    compile_small, tmp_path, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (environment,) = compile_small()
    assert "latency_hiding" not in environment["XLA_FLAGS"], "it goes with the program"
    assert not compile_small("--checkpoint.dir=a", "--log.dir=b")
    assert compile_small("--train.seed=7")
    assert compile_small(gpus_per_node=4)
    for name, value in (
        ("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false"),
        ("JAX_OPTIMIZATION_LEVEL", "O0"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest"),
    ):
        monkeypatch.setenv(name, value)
        [environment] = compile_small()
        options = environment[name].partition(" --xla_dump_to=")[0]
        assert options.endswith(value), "as in a run, the user's value comes last"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_schedule=false")
    with pytest.raises(
        errors.UserError, match="did you mean xla_gpu_enable_latency_hiding_scheduler"
    ):
        compile_small()
    monkeypatch.delenv("XLA_FLAGS")
    for file in (tmp_path / "gpt3jax" / "plan").iterdir():
        file.write_bytes(file.read_bytes()[:-9])  # cut off
    assert compile_small()


def test_compiled_kernels_are_handed_on_to_the_next_process(compile_small, tmp_path, monkeypatch):
    """Each works on a copy of its own; what it leaves there is what the next one finds."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    found = []

    def add_a_kernel(env):
        file = pathlib.Path(
            re.findall(r"--xla_gpu_kernel_cache_file='([^']+)'", env["XLA_FLAGS"])[-1]
        )
        found.append(file.read_text() if file.exists() else "")
        file.write_text(found[-1] + "kernel ")

    for seed in range(3):
        assert compile_small(f"--train.seed={seed}", beside=add_a_kernel)
    assert found == ["", "kernel ", "kernel kernel "]
    (file,) = (tmp_path / "gpt3jax" / "plan").glob("kernels*")
    file.write_bytes(file.read_bytes()[:-9])  # cut off: XLA would fail on what is left
    assert compile_small("--train.seed=3", beside=add_a_kernel)
    assert found[-1] == ""


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(
    compile_small, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert compile_small()
    assert list(tmp_path.glob("gpt3jax-*/plan/*.json.gz"))
    monkeypatch.setattr(tempfile, "tempdir", str(file))
    with pytest.raises(errors.UserError, match="set XDG_CACHE_HOME"):
        compile_small()


TRACEBACK = """
E1124 12:00:00.000000 1 x.cc:1] a warning of XLA
Traceback (most recent call last):
  File "x.py", line 1, in <module>
jaxlib._jax.XlaRuntimeError: INTERNAL: it does not lower
  of several lines
"""


@pytest.mark.parametrize(
    ("status", "stderr", "message"),
    [
        (2, 'warning\n["mesh.tensor=5 does not divide", "plan.md"]\n', "mesh.tensor=5 does not"),
        (1, TRACEBACK, "failed: jaxlib._jax.XlaRuntimeError: INTERNAL: it does not lower"),
        (
            -6,
            "F1124 12:00:00.0 1 y.cc:2] Check failed: a\n*** stack",
            "SIGABRT: F1124 .* failed: a",
        ),
        (-9, "", "ended by SIGKILL .is there too little memory"),
    ],
)
def test_why_the_compiler_ended_is_an_error_of_one_line(
    status, stderr, message, recipe_file, tmp_path, monkeypatch
):
    def fail(*_, **options):
        return subprocess.CompletedProcess([], status, stderr=stderr)

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(subprocess, "run", fail)
    with pytest.raises(errors.UserError, match=message) as error:
        compile_step(recipe_file)
    assert "\n" not in str(error.value) and documents.points_on(str(error.value))


def collectives_of(recipe_file, n_gpus):
    """Return the bytes that each kind of collective must send over each axis, by closed forms.

    Kinds that send less than a hundredth of all, sums of vectors, are left out: they are rough.
    """
    cfg, h100 = recipe.parse([f"--config={recipe_file}", "--data.mock"]), gpus.GPUS["h100"]
    layout = placement.lay_out(cfg, n_gpus, 8)
    time = time_model.estimate(cfg, layout, h100, gpus.network_of(h100), "expected")
    needed = collections.Counter()
    for row in time.traffic:
        needed[row.axis, row.kind] += row.bytes_per_step
    return {of: n_bytes for of, n_bytes in needed.items() if n_bytes > 0.01 * needed.total()}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for compiled steps that tests share; XLA_FLAGS must hold it in quotes."""
    return str(tmp_path_factory.mktemp("plan") / "it's a cache")


@pytest.mark.slow
@compiles
def test_small_step_compiles_for_h100_with_cudnn_and_known_collectives(
    recipe_file, repository, tmp_path, cache, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    file, program = tmp_path / "plan.json", tmp_path / "step.hlo"
    args = [f"--config={recipe_file}", "--gpus=8", "--verify", f"--json={file}"]
    assert plan.main([*args, f"--dump-hlo={program}"]) == 0
    content = json.loads(file.read_text())
    golden = repository / "tests" / "golden" / "plan" / "report_compiled.json"
    assert list(content) == list(json.loads(golden.read_text()))
    assert content["compiled"]["fused_attention"] == {"forward": True, "backward": True}
    sent = {(row["axis"], row["kind"]): row["bytes_per_step"] for row in content["collectives"]}
    needed = collectives_of(recipe_file, 8)
    # Closed forms leave out embedding and head, as large here as a layer: of both the gradient is
    # reduced, and versions of XLA differ in how often they gather them. And the two layers, which
    # gather weights ahead, add up the gradients of QKV and projection three times.
    for of, n_bytes in needed.items():
        assert 0.99 * n_bytes < sent[of] < 2.9 * n_bytes, of
    # jaxlib 0.12 sums some vectors over data beside the other gradients, 0.3% more.
    assert sent["data", "all-reduce"] == pytest.approx(needed["data", "all-reduce"], rel=0.004)
    others = sum(n_bytes for of, n_bytes in sent.items() if of not in needed)
    # The positions' gradient, summed over tensor, is most of the rest.
    assert others < 0.02 * sum(sent.values())
    parts = content["step_parts_expected"]  # of every version that was tried
    assert parts["matmul"] == pytest.approx(5.04e-5, rel=0.01)
    assert parts["elementwise"] == pytest.approx(3.81e-4, rel=0.05)
    assert content["peak_bytes_per_gpu"] == pytest.approx(23.7e6, rel=0.04)
    assert content["compiled"]["largest_buffers"][0]["source"].startswith("gpt3jax/")
    states = sum(content["memory"][name] for name in ("parameters", "optimizer", "batch"))
    assert content["compiled"]["argument_bytes"] == pytest.approx(states, rel=0.01)
    text = program.read_text()
    assert "reduce-scatter-start" in text or "all-gather-start" in text
    network = gpus.network_of(gpus.GPUS["h100"])
    rates = timeline.Rates(
        matmul=1e15,
        matmul_8_bits=1e15,
        cudnn=1e15,
        cudnn_backward=1e15,
        triton=1e15,
        memory=1e12,
        memory_peak=1e12,
        network=network,
    )
    walked = 8 * timeline.walk(hlo.parse(text), content["mesh"], rates).flops
    # All trips of all loops, with recomputation.
    arithmetic = content["model_flops_per_step"] * (1 + content["recomputed_share"])
    assert walked == pytest.approx(arithmetic, rel=0.03)
    assert not re.search(r"all-gather[^=]*\(.*\[\d+,512,2048\]", text)  # whole logits
    assert plan.main(args) == 0
    assert json.loads(file.read_text())["compiled"]["cached"]


@pytest.mark.slow
@compiles
def test_a_program_in_another_spelling_is_refused(recipe_file, cache, monkeypatch):
    """A part that a version writes in another way must not be missing from a step's time."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    args = [f"--config={recipe_file}", "--data.mock"]
    cfg, h100 = recipe.parse(args), gpus.GPUS["h100"]
    target = step_report.Target(gpu=h100, network=gpus.network_of(h100), price=0.0)
    layout = placement.lay_out(cfg, 8, 8)
    whole = compiler.compile_step(cfg, args, layout.sizes, h100, target.network)
    step_report.build(cfg, layout, target, whole)
    for written, message in {
        '"__cublas$': "has no cost that is known, but sol",
        '"__cudnn$fmha': "FLOPs a GPU were found",
        '"mask_type"': "mask, window or 4 dimensions of the attention",
        '"sliding_window_length"': "mask, window or 4 dimensions of the attention",
        '"lhs_contracting_dimensions"': "no dimensions that it sums over",
        '"exec_time_us"': "no cost of XLA's model was found",
        '"name":""': "has no cost that is known",
        '"is_sync"': "no collective says whether",
        "calls=": "fuses was not found",
        "body=": "repeats was not found",
        "condition=": "and XLA does not say how often it runs",
        "replica_groups=": "groups of a collective are written in another way",
        "all-gather-start": "which is not known",
        "all-reduce-start": "which is not known",
        "while(": "FLOPs a GPU were found",
        "ENTRY ": "no entry computation",
    }.items():
        text = whole.text.replace(written, f"{written[:2]}newer{written[2:]}")
        assert text != whole.text, written
        with pytest.raises(
            errors.UserError, match=f"cannot read .*{re.escape(message)}.*--no-compile"
        ):
            step_report.build(cfg, layout, target, doctored(whole, text))


def doctored(compiled, text):
    return dataclasses.replace(
        compiled, text=text, program=hlo.parse(text), fused_attention=hlo.fused_attention(text)
    )


@pytest.mark.slow
@compiles
@pytest.mark.parametrize("documents", [False, pytest.param(True, marks=pytest.mark.slower)])
def test_attention_over_a_split_sequence_compiles_for_h100(
    recipe_file, documents, cache, monkeypatch
):
    """With cuDNN's kernels, whose module is private to JAX."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    args = [
        "--mesh.data=1", "--mesh.fsdp=1", "--mesh.tensor=1", "--mesh.context=2",
        "--batch.global-batch-size=1", "--model.n-layers=1",
        *["--data.reset-attention-mask", "--data.eod-id=0"] * documents,
    ]  # fmt: skip
    built = planning.plan(plan_options.Options(config=recipe_file, gpus=2), args, "")
    assert built.compiled.fused_attention == {"forward": True, "backward": True}


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(
    "options",
    [
        ["--mesh.fsdp=2", "--data.reset-position-ids", "--data.eod-id=0"],
        pytest.param(
            ["--mesh.stage=2", "--mesh.fsdp=1", "--model.attention-dropout=0.1"],
            marks=pytest.mark.slower,
        ),
    ],
    ids=" ".join,
)
def test_no_step_adds_by_atomics(recipe_file, options, cache, monkeypatch):
    """Which a scatter does that may meet an index twice: its order varies on a GPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    args = ["--mesh.data=-1", "--mesh.tensor=2", *options]
    step = compile_text(recipe_file, args)
    scatters = [line for line in step.splitlines() if re.search(r" (select-and-)?scatter\(", line)]
    assert not scatters
    assert " sort(" in step, "where the embedding's gradient is added up"


@pytest.mark.slow
@compiles
@pytest.mark.parametrize(
    "options",
    [
        ["--mesh.fsdp=2", "--mesh.tensor=2", "--model.remat=mlp"],
        ["--mesh.stage=2", "--mesh.fsdp=2", "--model.remat=full"],
        pytest.param(["--mesh.fsdp=4", "--model.remat=none"], marks=pytest.mark.slower),
        pytest.param(
            ["--mesh.fsdp=8", "--mesh.data=1", "--model.remat=dots", "--precision.end-layers=1"],
            marks=pytest.mark.slower,
        ),
        pytest.param(
            ["--mesh.tensor=2", "--mesh.shard-optimizer=True", "--model.remat=mlp"],
            marks=pytest.mark.slower,
        ),
    ],
    ids=" ".join,
)
def test_all_products_of_layers_are_in_8_bits_on_h100s(recipe_file, options, cache, monkeypatch):
    """And no other: the head's three stay. Each of four matrices has three, and some run again."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    args = [
        "--mesh.data=-1", "--mesh.fsdp=1", "--mesh.tensor=1", "--model.n-layers=4",
        "--precision.matmul-dtype=float8", *options,
    ]  # fmt: skip
    text = compile_text(recipe_file, args)
    cfg = recipe.parse([f"--config={recipe_file}", "--data.mock", *args])
    layout = placement.lay_out(cfg, 8, 8)
    h100 = gpus.GPUS["h100"]
    time = time_model.estimate(
        cfg, layout, h100, gpus.network_of(h100), "expected", hlo.parse(text)
    )
    forms = time_model.estimate(cfg, layout, h100, gpus.network_of(h100), "expected")
    assert time.parts.flops_8_bits == pytest.approx(forms.parts.flops_8_bits, rel=1e-3)
    in_16_bits = time.parts.flops - time.parts.flops_8_bits
    others = forms.parts.flops - forms.parts.flops_8_bits
    assert in_16_bits == pytest.approx(others, rel=0.2)  # of which attention's kernels do more
    equations = collections.Counter(
        re.findall(r'custom_call_target="__cublas[^"]*matmul".*op_name="[^"]*/([^/"]*)/dot', text)
    )
    if "end-layers" not in " ".join(options):
        assert all("v" in equation for equation in equations), "only the head's"
    layers = re.findall(r'target="__cublas\$lt\$matmul\$f8".*op_name="[^"]*/([^/"]*)/dot', text)
    assert len(set(layers)) >= 12, set(layers)
    gathers = re.findall(r"(\w+)\[[^=]*all-gather-start", text)
    if "--mesh.stage=2" not in options and "--mesh.fsdp" in "".join(options):
        assert "f8e4m3fn" in gathers


def compile_text(recipe_file, args):
    """Return the text of the step that a plan compiles for 8 H100."""
    with tempfile.NamedTemporaryFile("r") as file:
        options = plan_options.Options(config=recipe_file, gpus=8, dump_hlo=file.name)
        planning.plan(options, args, "")
        return pathlib.Path(file.name).read_text()


@compiles
@pytest.mark.slower
@pytest.mark.parametrize("attention_dropout", [0.0, 0.1])  # cuDNN's attention, XLA's
def test_one_microbatchs_activations_are_held_as_the_closed_forms_say(
    recipe_file, attention_dropout
):
    args = [
        "--mesh.fsdp=8", "--mesh.tensor=1", "--model.n-layers=6", "--model.seq-len=1024",
        "--batch.microbatch-size=8", "--model.remat=none",
        f"--model.attention-dropout={attention_dropout}",
    ]  # fmt: skip
    peaks = []
    for n_microbatches in (1, 2, 5):
        options = plan_options.Options(config=recipe_file, gpus=8)
        built = planning.plan(
            options, [*args, f"--batch.global-batch-size={64 * n_microbatches}"], ""
        )
        peaks.append(built.peak.peak_bytes_per_gpu)
        assert built.peak.estimated_peak_bytes_per_gpu == pytest.approx(peaks[-1], rel=0.25)
    assert max(peaks) < 1.15 * peaks[0], "XLA holds more than one microbatch"


@compiles
@pytest.mark.slower
@pytest.mark.parametrize("n_stages", [1, 2])
def test_zero_gathers_matrices_in_the_compute_format(recipe_file, n_stages):
    args = [
        "--mesh.data=4", "--mesh.fsdp=1", f"--mesh.stage={n_stages}",
        f"--mesh.tensor={2 // n_stages}", "--mesh.shard-optimizer", "--model.d-model=512",
        "--model.n-layers=4",
    ]  # fmt: skip
    built = planning.plan(plan_options.Options(config=recipe_file, gpus=8), args, "")
    sent = sum(
        row.bytes_per_step
        for row in built.time.collectives
        if row.kind == "all-gather" and row.axis == "data"
    )
    layers = 4 * 12 * 512**2 / 2  # on 2 stages or 2 of tensor
    ends = built.work.parameters - 4 * 12 * 512**2  # at most, and in fp32
    assert 0.9 * 2 * layers * 3 / 4 < sent < 1.1 * (2 * layers + 4 * ends) * 3 / 4


@compiles
@pytest.mark.slower
@pytest.mark.parametrize("virtual_stages", [1, 2])
def test_stages_keep_no_copy_of_weights_or_gradients_for_a_tick(recipe_file, virtual_stages):
    args = [
        "--mesh.data=1", "--mesh.stage=4", "--mesh.fsdp=1", "--mesh.tensor=2",
        f"--mesh.virtual-stages={virtual_stages}",
        "--model.n-layers=8", "--model.d-model=1024", "--model.seq-len=128", "--model.remat=none",
    ]  # fmt: skip
    peaks = []
    for n_microbatches in (4, 32):
        options = plan_options.Options(config=recipe_file, gpus=8)
        built = planning.plan(options, [*args, f"--batch.global-batch-size={n_microbatches}"], "")
        peaks.append(built.peak.peak_bytes_per_gpu)
        assert built.peak.estimated_peak_bytes_per_gpu == pytest.approx(peaks[-1], rel=0.25)
    of_a_stage = 2 * 12 * 1024**2  # 8 layers on 4 stages x 2 of tensor, in 2 bytes
    n_ticks = 28 * virtual_stages  # more
    assert peaks[1] - peaks[0] < 0.5 * n_ticks * of_a_stage / virtual_stages
