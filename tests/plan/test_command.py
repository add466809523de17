"""The command: the JSON contract, errors, search, the page, and a step compiled for H100s."""

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
from gpt3jax.plan import (
    compiler,
    hlo,
    legible,
    memory_model,
    placement,
    planning,
    report,
    search,
    time_model,
    timeline,
)
from gpt3jax.plan import options as plan_options

CONTRACT = {
    "fits", "peak_bytes_per_gpu", "memory", "step_seconds", "mfu", "tokens_per_second_per_gpu",
    "exposed_communication_seconds", "collectives", "compile_seconds", "versions",
}  # fmt: skip
WSD = ["--optimizer.decay=wsd", "--optimizer.wsd-decay-samples=200"]
compiles = pytest.mark.skipif(bool(compiler.missing_extra()), reason="needs the extra plan")


@pytest.fixture
def recipe_file(tmp_path):
    """A GPT small enough to compile in seconds, and with what cuDNN's attention needs."""
    file = tmp_path / "small.py"
    file.write_text(
        "from gpt3jax.config import *\n"
        "def get_config():\n"
        "    return Config(\n"
        "        model=Model(n_layers=2, d_model=256, n_heads=4, seq_len=512, vocab_size=2000,\n"
        "                    attention_dropout=0.0),\n"
        "        optimizer=Optimizer(peak_lr=1e-4),\n"
        "        batch=Batch(global_batch_size=16),\n"
        "        mesh=Mesh(data=-1, fsdp=2, tensor=2),\n"
        "        train=Train(n_steps=10),\n"
        "    )\n"
    )
    return str(file)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--gpus=12"], "not a multiple of --gpus-per-node=8"),
        (["--gpus=8", "--mesh.data=4"], "the axes' product must be 8"),
        (["--gpus=16", "--mesh.data=2"], "--mesh.data=4"),
        (["--gpus=8", "--gpu=h1000"], "use one of h100"),
        (["--gpus=64"], "global_batch_size=16 is not divisible"),
        (["--gpus=8", "--mesh.tensor=8"], "does not divide"),
        (["--gpus=8", "--nic-gbytes=0"], "--nic-gbytes=0.0 must be at least 0.001"),
        (["--gpus=8", "--nic-gbytes=nan"], "--nic-gbytes=nan must be at least"),
        (["--gpus=8", "--latency-us=inf"], "--latency-us=inf must be at least"),
        (["--gpus=8", "--price=-3"], "--price=-3.0 must be at least 0"),
        (["--gpus=8", "--json=/nowhere/plan.json"], "cannot be written"),
        (["--gpus=8", "--html=/"], "cannot be written"),
        (["--gpus=8", "--dump-hlo=x", "--no-compile"], "--dump-hlo needs"),
        (["--gpus=8", "--batch.schedule=0:4 x"], 'entry "x" must be'),
        (["--gpus=8", "--search", "--batch.schedule=0:4 x"], 'entry "x" must be'),
        (["--gpus=8", *WSD], "takes 200 samples, which exceeds the run's 160"),
        (["--gpus=8", "--search", *WSD], "takes 200 samples, which exceeds the run's 160"),
        (["--gpus=12", "--search"], "not a multiple of --gpus-per-node=8"),
        (["--gpus=24", "--search"], "no mesh of --gpus=24 divides batch.global_batch_size=16"),
    ],
)
def test_what_a_user_can_fix_is_one_line_and_comes_first(recipe_file, args, message, capsys):
    assert plan.main([f"--config={recipe_file}", "--no-compile", *args]) == 2
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and not shown.out


def test_report_without_compiling_keeps_the_contract(recipe_file, tmp_path, capsys):
    file = tmp_path / "plan.json"
    args = [f"--config={recipe_file}", "--gpus=8", "--no-compile", f"--json={file}", "--price=2"]
    assert plan.main(args) == 0
    content = json.loads(file.read_text())
    assert content.keys() >= CONTRACT
    assert content["step_seconds"].keys() == {"low", "expected", "high"}
    low, expected, high = content["step_seconds"].values()
    assert 0 < low < expected < high
    assert sum(content["memory"].values()) == pytest.approx(content["peak_bytes_per_gpu"], abs=8)
    assert content["mesh"]["data"] == 2 and content["compile_seconds"] is None
    assert content["cost"] == pytest.approx(2 * content["gpu_hours"])
    assert "Times are estimates" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "of the step waits for communication: --search"),
        (["--model.d-model=65536", "--model.n-layers=48"], "It does not fit: --search"),
        (["--nic-gbytes=1e6", "--nvlink-gbytes=1e6", "--latency-us=1e-3"], ""),
        (["--search"], ""),
    ],
)
def test_search_is_advised_where_it_may_help(recipe_file, args, message, capsys):
    assert plan.main([f"--config={recipe_file}", "--gpus=16", "--no-compile", *args]) == 0
    shown = capsys.readouterr().out
    assert message in shown and ("--search" in shown) == bool(message)


def test_verify_fails_what_does_not_fit_or_would_be_refused(repository, capsys):
    def status(*args):
        path = repository / "configs" / "175b.py"
        return plan.main([f"--config={path}", "--no-compile", "--verify", *args])

    constant = "--batch.schedule="
    assert status("--gpus=1024", constant) == 0
    assert status("--gpus=1024") == 1  # the schedule's 16 sequences on 128 ranks
    assert "would refuse" in capsys.readouterr().out
    assert status("--gpus=16", "--mesh.fsdp=2", constant) == 1
    assert "NO" in capsys.readouterr().out


def test_users_text_is_printed_as_it_is(recipe_file, capsys, monkeypatch):
    """Rich would take what is in brackets for its markup."""
    monkeypatch.setattr(compiler, "missing_extra", lambda: "run pip install -e '.[plan]'")
    assert plan.main([f"--config={recipe_file}", "--gpus=8"]) == 0
    assert "'.[plan]'" in capsys.readouterr().out


def test_searched_layouts_fit_and_their_options_give_them(recipe_file):
    cfg = recipe.parse([f"--config={recipe_file}", "--data.mock"])
    gpu = gpus.GPUS["h100"]
    candidates = search.candidates(cfg, 8, gpu, gpus.network_of(gpu))
    assert len(candidates) > 50
    seconds = [candidate.seconds for candidate in candidates]
    assert seconds == sorted(seconds)
    queue = search.Queue(candidates, gpu)
    for candidate in (queue.next() for _ in range(20)):
        again = recipe.parse([f"--config={recipe_file}", "--data.mock", *candidate.overrides])
        assert again == candidate.cfg
        layout = placement.lay_out(again, 8, 8)
        assert layout.sizes == candidate.layout.sizes
        assert sum(memory_model.memory(again, layout).values()) == candidate.peak_bytes
        assert candidate.layout.n_gpus == 8


def test_a_compiled_peak_corrects_the_closed_forms_of_its_kind(recipe_file):
    cfg = recipe.parse([f"--config={recipe_file}", "--data.mock"])
    gpu = gpus.GPUS["h100"]
    candidates = search.candidates(cfg, 8, gpu, gpus.network_of(gpu))
    queue = search.Queue(candidates, gpu)
    first = queue.next()
    assert first is candidates[0]
    queue.note(first, gpu.memory_bytes * 1e6)  # the smallest would not fit either
    rest = list(iter(queue.next, None))
    assert rest and all(candidate.cfg.model.remat != first.cfg.model.remat for candidate in rest)
    meshes = [str(candidate.layout.sizes) for candidate in [first, *rest]]
    assert max(map(meshes.count, meshes)) <= search.PER_MESH


def test_search_prints_options_and_plans_the_fastest(recipe_file, tmp_path, capsys):
    file, page = tmp_path / "plan.json", tmp_path / "plan.html"
    args = ["--gpus=8", "--search", "--no-compile", f"--json={file}", f"--html={page}"]
    assert plan.main([f"--config={recipe_file}", *args]) == 0
    content = json.loads(file.read_text())
    best = content["search"][0]
    assert best["step_seconds"] == min(row["step_seconds"] for row in content["search"])
    assert best["step_seconds"] == pytest.approx(content["step_seconds"]["expected"])
    assert " ".join(best["overrides"]) in capsys.readouterr().out
    text = page.read_text()
    assert "http" not in text.replace("http-equiv", "")  # it needs nothing from elsewhere
    for words in (
        "Memory of a GPU",
        "matmul",
        f"remat {content['step']['remat']}",
        *best["overrides"],
    ):
        assert words in text
    assert f"--model.remat={content['step']['remat']}" in best["overrides"]


@pytest.mark.parametrize(
    ("growth", "dropped"),
    [("--batch.schedule=0:4 1M:16", "--batch.schedule="), ("--batch.ramp 4 4 100", "--batch.ramp")],
)
def test_search_says_where_it_drops_a_growing_batch(recipe_file, growth, dropped, capsys):
    option, _, values = growth.partition(" ")
    growth = [option, *values.split()] if "ramp" in growth else [growth]
    args = [f"--config={recipe_file}", "--gpus=16", "--data.mock", *growth]
    cfg, gpu = recipe.parse([args[0], *args[2:]]), gpus.GPUS["h100"]
    candidates = search.candidates(cfg, 16, gpu, gpus.network_of(gpu))
    assert {dropped in candidate.overrides for candidate in candidates} == {True, False}
    for candidate in candidates:
        grows = bool(candidate.cfg.batch.schedule or candidate.cfg.batch.ramp)
        assert candidate.drops_schedule == (dropped in candidate.overrides) != grows
    first = next(candidate for candidate in candidates if candidate.drops_schedule)
    again = recipe.parse([args[0], *args[2:], *first.overrides])
    assert again == first.cfg
    assert plan.main([*args, "--search", "--no-compile", "--n-compiled=20"]) == 0
    assert "leave out the recipe's growing batch" in capsys.readouterr().out


def compiled(peak_bytes):
    text = "\nENTRY %main (p: f32[4]) -> f32[4] {\n  %a = f32[400000]{0} add(%p, %p)\n}\n"
    return compiler.Compiled(
        argument_bytes=0, temp_bytes=0, peak_bytes=peak_bytes, attention="cudnn",
        largest_buffers=[], cudnn={}, compile_seconds=1.0, host_bytes=0, versions={}, cached=False,
        text=text, program=hlo.parse(text),
    )  # fmt: skip


def test_search_goes_on_after_a_failed_compile_and_while_nothing_fits(
    recipe_file, tmp_path, capsys, monkeypatch
):
    answers = [errors.UserError("it broke"), *[compiled(10**12)] * 2, compiled(10**9)]

    def compile_step(cfg, args, sizes, gpu, network):
        answer = answers.pop(0) if len(answers) > 1 else answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", compile_step)
    monkeypatch.setattr(legible, "check", lambda *_: None)
    file = tmp_path / "plan.json"
    args = [f"--config={recipe_file}", "--gpus=8", "--search", "--verify", f"--json={file}"]
    assert plan.main([*args, "--n-compiled=1"]) == 0
    rows = json.loads(file.read_text())["search"]
    assert [row["fits"] for row in rows] == [True, False, False, False]
    assert [bool(row["failed"]) for row in rows] == [False, False, False, True]
    assert "(it broke)" in capsys.readouterr().out

    answers[:] = [compiled(10**12)]
    assert plan.main([*args, "--n-compiled=1"]) == 1
    assert len(json.loads(file.read_text())["search"]) == 1 + planning.MORE_COMPILED
    assert "none of these layouts fits" in capsys.readouterr().out

    answers[:] = [errors.UserError("it broke")]
    assert plan.main(args) == 2
    assert "none of 8 layouts compiled: it broke" in capsys.readouterr().err


def test_search_goes_on_where_a_program_cannot_be_read(recipe_file, capsys, monkeypatch):
    wrong = [hlo.unreadable("it is written in another way")]

    def check(*_):
        if wrong:
            raise wrong.pop()

    monkeypatch.setattr(compiler, "missing_extra", lambda: "")
    monkeypatch.setattr(compiler, "compile_step", lambda *_: compiled(10**9))
    monkeypatch.setattr(legible, "check", check)
    assert plan.main([f"--config={recipe_file}", "--gpus=8", "--search", "--n-compiled=2"]) == 0
    assert "it is written in another way" in capsys.readouterr().out


def compile_step(recipe_file, *options, gpus_per_node=8):
    """Compile the step of a small recipe on 8 A100."""
    args = [f"--config={recipe_file}", "--data.mock", *options]
    gpu = gpus.GPUS["a100"]
    network = gpus.network_of(gpu, gpus_per_node)
    sizes = {"data": 2, "stage": 1, "fsdp": 2, "context": 1, "tensor": 2}
    return compiler.compile_step(recipe.parse(args), args, sizes, gpu, network)


def compile_small(recipe_file, monkeypatch, *options, **network):
    """As `compile_step`, with a process that answers at once; return the variables it was given."""
    environments = []

    def answer(_, *, input, env, **options):
        environments.append(env)
        content = {**vars(compiled(7)), "hlo": compiled(7).text}
        for name in ("text", "program", "cudnn", "cached"):
            del content[name]
        file = pathlib.Path(json.loads(input)["out"])
        file.write_bytes(gzip.compress(json.dumps(content).encode()))
        return subprocess.CompletedProcess([], 0)

    monkeypatch.setattr(subprocess, "run", answer)
    step = compile_step(recipe_file, *options, **network)
    assert step.peak_bytes == 7 and step.cached != bool(environments)
    return environments


def test_a_step_is_compiled_again_where_the_program_is_another(recipe_file, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert compile_small(recipe_file, monkeypatch)
    assert not compile_small(recipe_file, monkeypatch, "--checkpoint.dir=a", "--log.dir=b")
    assert compile_small(recipe_file, monkeypatch, "--train.seed=7")
    assert compile_small(recipe_file, monkeypatch, gpus_per_node=4)
    for name, value in (
        ("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_scheduler=false"),
        ("JAX_OPTIMIZATION_LEVEL", "O0"),
        ("JAX_DEFAULT_MATMUL_PRECISION", "highest"),
    ):
        monkeypatch.setenv(name, value)
        [environment] = compile_small(recipe_file, monkeypatch)
        options = environment[name].partition(" --xla_dump_to=")[0]
        assert options.endswith(value), "as in a run, the user's value comes last"
    monkeypatch.setenv("XLA_FLAGS", "--xla_gpu_enable_latency_hiding_schedule=false")
    with pytest.raises(
        errors.UserError, match="did you mean xla_gpu_enable_latency_hiding_scheduler"
    ):
        compile_small(recipe_file, monkeypatch)
    monkeypatch.delenv("XLA_FLAGS")
    for file in (tmp_path / "gpt3jax" / "plan").iterdir():
        file.write_bytes(file.read_bytes()[:-9])  # cut off
    assert compile_small(recipe_file, monkeypatch)


def test_a_cache_that_cannot_be_written_is_replaced_by_a_temporary_one(
    recipe_file, tmp_path, monkeypatch
):
    file = tmp_path / "file"
    file.write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert compile_small(recipe_file, monkeypatch)
    assert list(tmp_path.glob("gpt3jax-*/plan/*.json.gz"))
    monkeypatch.setattr(tempfile, "tempdir", str(file))
    with pytest.raises(errors.UserError, match="set XDG_CACHE_HOME"):
        compile_small(recipe_file, monkeypatch)


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
        (2, "warning\nmesh.tensor=5 does not divide\n", "mesh.tensor=5 does not divide"),
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
    assert "\n" not in str(error.value)


def test_search_says_so_where_nothing_fits(repository, capsys):
    args = ["--gpus=8", "--search", "--no-compile"]
    assert plan.main([f"--config={repository / 'configs' / '175b.py'}", *args]) == 2
    assert "no layout of this model fits --gpus=8" in capsys.readouterr().err


def collectives_of(recipe_file, n_gpus):
    """Return the bytes that each kind of collective must send over each axis, by closed forms."""
    cfg, h100 = recipe.parse([f"--config={recipe_file}", "--data.mock"]), gpus.GPUS["h100"]
    layout = placement.lay_out(cfg, n_gpus, 8)
    time = time_model.estimate(cfg, layout, h100, gpus.network_of(h100), "expected")
    return {(row.axis, row.kind): row.bytes_per_step for row in time.traffic}


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """A folder for compiled steps that tests share; XLA_FLAGS must hold it in quotes."""
    return str(tmp_path_factory.mktemp("plan") / "it's a cache")


@compiles
def test_small_step_compiles_for_h100_with_cudnn_and_known_collectives(
    recipe_file, tmp_path, cache, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    file, program = tmp_path / "plan.json", tmp_path / "step.hlo"
    args = [f"--config={recipe_file}", "--gpus=8", "--verify", f"--json={file}"]
    assert plan.main([*args, f"--dump-hlo={program}"]) == 0
    content = json.loads(file.read_text())
    assert content.keys() >= CONTRACT
    assert content["compiled"]["cudnn"] == {"forward": True, "backward": True}
    sent = {(row["axis"], row["kind"]): row["bytes_per_step"] for row in content["collectives"]}
    needed = collectives_of(recipe_file, 8)
    # Closed forms leave out embedding and head, as large here as a layer: of both the gradient is
    # reduced, and versions of XLA differ in how often they gather them.
    for of, n_bytes in needed.items():
        assert 0.99 * n_bytes < sent[of] < 2.7 * n_bytes, of
    # jaxlib 0.12 sums some vectors over data beside the other gradients, 0.3% more.
    assert sent["data", "all-reduce"] == pytest.approx(needed["data", "all-reduce"], rel=0.004)
    others = sum(n_bytes for of, n_bytes in sent.items() if of not in needed)
    # The positions' gradient, summed over tensor, is most of the rest.
    assert others < 0.02 * sum(sent.values())
    parts = content["step_parts_expected"]  # of every version that was tried
    assert parts["matmul"] == pytest.approx(5.04e-5, rel=0.01)
    assert parts["elementwise"] == pytest.approx(3.47e-4, rel=0.05)
    assert content["peak_bytes_per_gpu"] == pytest.approx(26.2e6, rel=0.03)
    assert content["compiled"]["largest_buffers"][0]["source"].startswith("gpt3jax/")
    states = sum(content["memory"][name] for name in ("parameters", "optimizer", "batch"))
    assert content["compiled"]["argument_bytes"] == pytest.approx(states, rel=0.01)
    text = program.read_text()
    assert "reduce-scatter-start" in text or "all-gather-start" in text
    network = gpus.network_of(gpus.GPUS["h100"])
    rates = timeline.Rates(
        matmul=1e15, attention=1e15, memory=1e12, memory_peak=1e12, network=network
    )
    walked = 8 * timeline.walk(hlo.parse(text), content["mesh"], rates).flops
    # All trips of all loops, with what is recomputed.
    arithmetic = content["model_flops_per_step"] * (1 + content["recomputed_share"])
    assert walked == pytest.approx(arithmetic, rel=0.03)
    assert not re.search(r"all-gather[^=]*\(.*\[\d+,512,2048\]", text)  # whole logits
    assert plan.main(args) == 0
    assert json.loads(file.read_text())["compiled"]["cached"]


@compiles
def test_a_program_in_another_spelling_is_refused(recipe_file, cache, monkeypatch):
    """What a version writes in another way must not be left out of a step's time."""
    monkeypatch.setenv("XDG_CACHE_HOME", cache)
    args = [f"--config={recipe_file}", "--data.mock"]
    cfg, h100 = recipe.parse(args), gpus.GPUS["h100"]
    target = report.Target(gpu=h100, network=gpus.network_of(h100), price=0.0)
    layout = placement.lay_out(cfg, 8, 8)
    whole = compiler.compile_step(cfg, args, layout.sizes, h100, target.network)
    report.build(cfg, layout, target, whole)
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
            report.build(cfg, layout, target, doctored(whole, text))


def doctored(compiled, text):
    cudnn = hlo.cudnn_attention(text)
    return dataclasses.replace(compiled, text=text, program=hlo.parse(text), cudnn=cudnn)


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
    assert built.compiled.cudnn == {"forward": True, "backward": True}


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
