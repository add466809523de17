"""What a user can get wrong before the first step: exit status 2, and one line that helps."""

import pathlib
import sys
import traceback

import pytest

from gpt3jax import main
from gpt3jax.data import tokenizer_training
from gpt3jax.distributed import launchers
from gpt3jax.gradient import accumulation
from gpt3jax.model import loss
from gpt3jax.run import step_log

import corpus
import documents


@pytest.fixture
def run(tmp_path, monkeypatch, capfd):
    """Return a function that calls main in a new run's folder and returns its last words.

    It takes options, and returns what went to stderr once status and shape of it are checked.
    """
    for variable in ("SLURM_NTASKS", "WORLD_SIZE", *(one.rank for one in launchers.LAUNCHERS)):
        monkeypatch.delenv(variable, raising=False)

    def call(*options, n_lines=1):
        status = corpus.call_main(monkeypatch, tmp_path, *options)
        told = capfd.readouterr().err
        assert status == 2, told
        assert told.startswith("gpt3jax: error: ") and "Traceback" not in told
        assert len(told.splitlines()) == n_lines and documents.points_on(told), told
        assert not list(tmp_path.glob("checkpoints/*")), "nothing may be written before an error"
        return told

    corpus.write_run(tmp_path)
    return call


def without_recipe(monkeypatch, capfd, *argv):
    monkeypatch.setattr(sys, "argv", ["main", *argv])
    assert main.main() == 2
    told = capfd.readouterr().err
    assert len(told.splitlines()) == 1 and documents.points_on(told)
    return told


def test_without_a_recipe_main_says_how_to_give_one(monkeypatch, capfd):
    told = without_recipe(monkeypatch, capfd)
    assert "add --config=FILE, for example --config=configs/quickstart.py" in told


def test_a_missing_recipe_is_named_with_those_beside_it(monkeypatch, capfd, tmp_path):
    (tmp_path / "857m.py").touch()
    told = without_recipe(monkeypatch, capfd, f"--config={tmp_path}/875m.py")
    assert f"--config={tmp_path}/875m.py: no such file" in told and "857m.py" in told


@pytest.mark.parametrize(
    "text, fault",
    [("", "must define get_config()"), ("def get_config(): return {}", "not a Config")],
)
def test_a_recipe_that_gives_no_config_is_named(monkeypatch, capfd, tmp_path, text, fault):
    (tmp_path / "recipe.py").write_text(text)
    told = without_recipe(monkeypatch, capfd, f"--config={tmp_path}/recipe.py")
    assert f"--config={tmp_path}/recipe.py" in told and fault in told


@pytest.mark.parametrize(
    "option, nearest",
    [
        ("--optimizer.peak-lrr=1", "--optimizer.peak-lr"),
        ("--train.n-step=5", "--train.n-steps"),
        ("--optimizer.decay=cosin", "cosine"),
        ("--train.n-steps=many", "--train.n-steps"),
    ],
)
def test_a_mistyped_option_names_the_nearest(tmp_path, monkeypatch, capfd, option, nearest):
    corpus.write_run(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        corpus.call_main(monkeypatch, tmp_path, option)
    told = capfd.readouterr().err
    assert stopped.value.code == 2
    assert nearest in told.replace(option, "") and "Traceback" not in told
    assert documents.points_on(told)


@pytest.mark.parametrize(
    "options, words",
    [
        (["--mesh.data=3"], ["data 3", "does not fit 8 cpu device(s)"]),
        (["--mesh.tensor=3"], ["mesh.tensor=3", "model.n_heads=4", "use one of 1, 2, 4"]),
        (["--batch.global-batch-size=12"], ["batch.global_batch_size=12", "8"]),
        (["--batch.microbatch-size=3"], ["batch.microbatch_size=3", "batch.global_batch_size=8"]),
        (["--train.n-steps=0"], ["no length: set train.n_steps"]),
        (["--data.split=a,b"], ["data.split='a,b'", '"949,50,1"']),
        (["--data.split=0,1,1"], ["data.split='0,1,1'", "nothing to train on"]),
        (
            ["--data.split=100,0.01,1", "--train.eval-interval=5"],
            ["data.split='100,0.01,1'", "validation", "of corpus", "give it a larger weight"],
        ),
        (["--data.vocab-file=vocab.json"], ["data.vocab_file and data.merge_file go together"]),
        (
            ["--data.vocab-file=vocab.json", "--data.merge-file=merges.txt"],
            ["merges.txt: no such file"],
        ),
        (
            ["--data.vocab-file=vocab.json", "--data.merge-file=recipe.py"],
            ["recipe.py", "merge"],
        ),
        (["--data.from-text=nothing", "--data.paths=other"], ["data.vocab_file"]),
        (["--checkpoint.load=nothing"], ["checkpoint.load=nothing has no checkpoint"]),
        (["--checkpoint.load=recipe.py"], ["checkpoint.load=recipe.py has no checkpoint"]),
        (["--checkpoint.dir=recipe.py/here"], ["recipe.py/here"]),
        (["--checkpoint.dir=recipe.py"], ["recipe.py"]),
        (["--log.dir=recipe.py/here"], ["log.dir=recipe.py/here", "choose another folder"]),
        (
            ["--checkpoint.dir=steps/40"],
            ["steps/40 is itself a checkpoint", "/steps, whose"],
        ),
        (["--checkpoint.load=steps/40"], ["steps/40 is itself a checkpoint", "/steps, whose"]),
        (
            ["--checkpoint.dir=/proc/self/fdinfo"],
            ["checkpoint.dir=/proc/self/fdinfo cannot be written", "its permissions or its mount"],
        ),
        (["--log.dir=/proc/self/fdinfo"], ["log.dir=/proc/self/fdinfo cannot be written"]),
        (["--checkpoint.dir=gs://bucket/x"], ["checkpoint.dir=gs://bucket/x", "mount the store"]),
        (["--checkpoint.load=s3://bucket/x"], ["checkpoint.load=s3://bucket/x"]),
        (["--log.dir=s3://bucket/x"], ["log.dir=s3://bucket/x is the address of a store"]),
        (["--data.paths=gs://bucket/x"], ["data.paths=gs://bucket/x"]),
        (["--log.profile-steps", "5", "3"], ["log.profile_steps=5 3"]),
    ],
    ids=lambda value: " ".join(value) if value[0].startswith("--") else "",
)
def test_options_that_do_not_fit_are_named_with_the_fix(tmp_path, run, options, words):
    files = str(tmp_path / "vocab.json"), str(tmp_path / "other.txt")
    tokenizer_training.train(["a text"], 300, *files)
    (tmp_path / "steps" / "40" / "meta").mkdir(parents=True)
    (tmp_path / "steps" / "40" / "meta" / "metadata").write_text("{}")
    n_files = len(list(tmp_path.rglob("*")))
    told = run(*options)
    assert all(word in told for word in words), told
    made = {p.name for p in tmp_path.rglob("*")}
    assert len(list(tmp_path.rglob("*"))) - n_files <= len(made & {"checkpoints", "logs"})


@pytest.mark.parametrize("prefix", ["nothing", "corpus.bin", "corpus.idx"])
def test_a_missing_corpus_is_named(run, prefix):
    told = run(f"--data.paths={prefix}")
    assert prefix in told and "no such file" in told
    if prefix != "nothing":
        assert "data.paths takes the prefix of both files: 'corpus'" in told


@pytest.mark.parametrize("words", ["0.5 corpus 0.5", "corpus 0.5", "corpus 0.5 corpus 0.5"])
def test_a_blend_in_another_order_is_told_the_right_one(run, words):
    told = run("--data.paths", *words.split())
    assert "0.5 stands where a prefix is expected: a blend is WEIGHT PREFIX WEIGHT PREFIX" in told


@pytest.mark.parametrize("n_left", [0, 5, 20, 3000])
@pytest.mark.parametrize("name", ["corpus.bin", "corpus.idx"])
def test_a_truncated_corpus_is_named(tmp_path, run, name, n_left):
    content = (tmp_path / name).read_bytes()
    assert len(content) > n_left
    (tmp_path / name).write_bytes(content[:n_left])
    assert name in run()


def test_tokens_of_another_vocabulary_are_found_at_the_start(run):
    told = run("--model.vocab-size=32", "--checkpoint.dir=")
    assert "corpus" in told and "bin has token" in told and "outside of model.vocab_size=32" in told


@pytest.mark.parametrize(
    "variables, options, words",
    [
        ({"SLURM_NTASKS": "4"}, [], ["SLURM_NTASKS=4", "start it with srun"]),
        (
            {},
            ["--distributed.n-processes=2"],
            ["distributed.n_processes=2", "start it with srun or mpirun"],
        ),
        (
            {"PMI_SIZE": "4", "PMI_RANK": "1"},
            [],
            ["PMI_SIZE=4, as MPICH", "train alone", "--distributed.coordinator-address HOST:PORT"],
        ),
        pytest.param(
            {},
            ["--distributed.process-id=0", "--distributed.coordinator-address=localhost:1"],
            ["distributed.n_processes"],
        ),
    ],
    ids=["srun", "alone", "mpich", "no-number"],
)
def test_no_process_of_several_trains_alone(monkeypatch, run, variables, options, words):
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    told = run("--data.paths=nothing", *options)  # so a failure of this test need not train
    assert all(word in told for word in words), told


WITHOUT_ORBAX = """
import os, sys
from gpt3jax.distributed import joining
joining.start = lambda *_: os._exit(7 + any("orbax" in name for name in sys.modules))
"""


def test_orbax_is_imported_after_the_devices_are_chosen(tmp_path):
    """It decides at once, by JAX_PLATFORMS, how it saves: without a launcher as with one."""
    process = corpus.start_main(corpus.write_run(tmp_path), patch=WITHOUT_ORBAX)
    _, err = process.communicate(timeout=100)
    assert process.returncode == 7, err


def test_the_way_from_main_to_the_gradient_is_short(tmp_path, monkeypatch):
    """It is the stack of a real run at the function that is differentiated, on a mixed mesh."""
    package = str(corpus.REPOSITORY / "gpt3jax")
    ways = []

    def note_way(*args):
        frames = [
            frame for frame in traceback.extract_stack() if frame.filename.startswith(package)
        ]
        ways.append([(pathlib.Path(frame.filename), frame.name) for frame in frames])
        return microbatch_loss(*args)

    microbatch_loss = accumulation.microbatch_loss
    monkeypatch.setattr(accumulation, "microbatch_loss", note_way)
    # The loop compiles the step before it calls it: here its own call is followed.
    monkeypatch.setattr(step_log.StepLog, "compile_first", lambda *_: None)
    folder = corpus.write_run(tmp_path)
    mesh = ("--mesh.data=2", "--mesh.fsdp=2", "--mesh.tensor=2")
    options = (*mesh, "--train.n-steps=1", "--train.eval-interval=0", "--checkpoint.dir=")
    assert corpus.call_main(monkeypatch, folder, *options) == 0
    [way] = ways
    assert way[0] == (pathlib.Path(package, "main.py"), "main")
    assert len(way) - 1 <= 9, way  # calls: main is not called from the package
    files = {file for file, _ in way} | {pathlib.Path(loss.__file__)}
    n_lines = sum(len(file.read_text().splitlines()) for file in files)
    assert 300 < n_lines < 1000, (n_lines, files)
