"""The adapter for lm-eval: its answers computed by hand, and a task that runs without a network."""

import json
import pathlib
import string
import subprocess
import sys

import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gpt3jax import errors
from gpt3jax.checkpoint import parameters
from gpt3jax.convert import __main__ as convert
from gpt3jax.data import tokenizer, tokenizer_sources, tokenizer_training
from gpt3jax.evaluate import evaluation, options, token_losses, windows
from gpt3jax.sample import generate

import tiny

pytestmark = pytest.mark.filterwarnings("ignore")  # of lm-eval and what it imports
lm_eval = pytest.importorskip("lm_eval")

from lm_eval.api import instance, registry  # noqa: E402

from gpt3jax.evaluate import lm_eval_model  # noqa: E402

GOLDEN = pathlib.Path(__file__).parents[1] / "golden" / "hf_gpt2"
TASK = """
task: tiny_choice
dataset_path: json
dataset_kwargs: {data_files: {test: QUESTIONS}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc}]
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Return a folder with a checkpoint of the golden GPT-2 and a byte-level tokenizer."""
    folder = tmp_path_factory.mktemp("lm_eval")
    convert.from_hf(convert.FromHf(folder=str(GOLDEN), output=str(folder / "checkpoint")))
    tokenizer_training.train(
        ["no merges"], 257, str(folder / "vocab.json"), str(folder / "merges.txt")
    )
    return folder


@pytest.fixture(scope="module")
def bpe(folder):
    return tokenizer_sources.from_files(str(folder / "vocab.json"), str(folder / "merges.txt"))


@pytest.fixture(scope="module")
def source(folder):
    return parameters.open_newest(str(folder / "checkpoint"), tiny.one_device_mesh())


@pytest.fixture(scope="module")
def scorer(source):
    return token_losses.Scorer(source.params(), source.program, source.cfg.data, 32)


@pytest.fixture
def lm(source, bpe):
    return lm_eval_model.CheckpointLM(source, bpe, batch_size=3)


def requests(kind, *args):
    return [
        instance.Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(args)
    ]


def likeliest(scorer, ids):
    """Return the token that the model holds likeliest behind these."""
    losses = []
    for low in range(0, 257, 32):
        rows = [np.asarray([*ids, token]) for token in range(low, min(257, low + 32))]
        losses += [row_losses[-1] for row_losses, _ in scorer.score(rows)]
    return int(np.argmin(losses))


def test_loglikelihoods_are_the_sums_of_the_continuation(lm, bpe, scorer):
    pairs = [
        ("Friends, Romans", " countrymen"), ("", "lend"), ("me your ", "ears"), ("a", "b"),
        ("x" * 100, "y" * 10),
    ]  # fmt: skip
    answers = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    for (context, continuation), (total, is_greedy) in zip(pairs, answers, strict=True):
        ids = [*(bpe.encode(context) or [bpe.eod_id]), *bpe.encode(continuation)][-65:]
        n = len(continuation) + (len(context) - len(context.rstrip()))
        losses, greedy = scorer.score([np.asarray(ids)])[0]
        np.testing.assert_allclose(total, -losses[-n:].sum(), rtol=1e-5)
        assert is_greedy == greedy[-n:].all()


def test_a_continuation_is_greedy_if_it_is_the_likeliest(lm, bpe, scorer):
    pairs = []
    for context in string.ascii_letters:
        best = bpe.decode([likeliest(scorer, bpe.encode(context))])
        if best in string.ascii_letters:
            pairs += [(context, best), (context, "Z" if best != "Z" else "Y")]
    assert len(pairs) >= 4
    answers = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
    assert [is_greedy for _, is_greedy in answers] == [True, False] * (len(pairs) // 2)


def test_lm_eval_finds_the_model_by_its_name(folder, lm):
    args = f"checkpoint={folder}/checkpoint,vocab_file={folder}/vocab.json"
    args += f",merge_file={folder}/merges.txt,stride=9"
    by_name = registry.get_model("gpt3jax").create_from_arg_string(args, {"batch_size": 2})
    pairs = [("Friends", " Romans"), ("", "lend")]
    theirs, ours = (
        m.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True) for m in (by_name, lm)
    )
    np.testing.assert_allclose([x for x, _ in theirs], [x for x, _ in ours], rtol=1e-5)


def test_a_continuation_that_does_not_fit_is_refused(lm):
    with pytest.raises(errors.UserError, match="a continuation of 65 tokens"):
        lm.loglikelihood(requests("loglikelihood", ("a", "b" * 65)), disable_tqdm=True)


@pytest.mark.parametrize("stride", [0, 10])
def test_whole_texts_are_scored_as_the_command_does(
    folder, source, bpe, stride, monkeypatch, capsys
):
    texts = ["lend me your ears; " * 11, "I come", "to bury Caesar. " * 6]
    lm = lm_eval_model.CheckpointLM(source, bpe, batch_size=3, stride=stride)
    answers = lm.loglikelihood_rolling(
        requests("loglikelihood_rolling", *[(t,) for t in texts]), disable_tqdm=True
    )
    monkeypatch.chdir(folder)
    for text, answer in zip(texts, answers, strict=True):
        (folder / "text.txt").write_text(text)
        given = options.Options(
            checkpoint="checkpoint", text="text.txt", stride=stride or 64,
            source=tokenizer_sources.Source(vocab_file="vocab.json", merge_file="merges.txt"),
        )  # fmt: skip
        result = evaluation.measure(given, source)
        np.testing.assert_allclose(answer, -result.loss * result.tokens, rtol=1e-6)


@pytest.mark.parametrize("stride", [1, 3, 7, 8])
def test_windows_are_those_of_lm_eval(stride):
    tokens = list(range(10, 45))
    theirs = lm_eval.utils.get_rolling_token_windows(tokens, 0, 8, 8 - stride + 1)
    ours = windows.window_rows(np.asarray(tokens), 0, 8, stride)
    for (inputs, predicted), (row, n_counted) in zip(theirs, ours, strict=True):
        assert row[:-1].tolist() == inputs and row[-n_counted:].tolist() == predicted


@pytest.mark.slow
def test_generated_text_ends_before_the_stop(lm, bpe, scorer):
    def text_of(context, **options):
        return lm.generate_until(requests("generate_until", (context, options)), True)[0]

    context = "Friends, Romans"
    whole = text_of(context, max_gen_toks=12, until=[])
    ids = bpe.encode(context)
    best = likeliest(scorer, ids)
    assert bpe.decode([best])[0] in (whole[0], "\ufffd")
    stop = whole[4:6]
    place = whole.index(stop)
    assert text_of(context, max_gen_toks=12, until=[stop]) == whole[:place]
    assert text_of(context, max_gen_toks=12, until=stop, do_sample=False) == whole[:place]
    long = text_of("x" * 200, max_gen_toks=1000)
    assert len(bpe.encode(long)) <= 3 * 32
    with pytest.raises(errors.UserError, match="num_beams=3 in generating"):
        text_of(context, num_beams=3)


class Sat(generate.Generator):
    """Continues every prompt with one word, without a network."""

    def __init__(self, model):
        self.model, self.eod_id = model, 0

    def steps(self, rows, *, scored):  # noqa: D102
        for token in (3, 0):
            yield generate.Step([[token]] * len(rows), [[]] * len(rows))


def test_generated_text_keeps_its_first_space(source, monkeypatch):
    """With a tokenizer of SentencePiece's kind, whose words begin with their space."""
    words = {tokenizer.END_OF_TEXT: 0, "\u2581the": 1, "\u2581cat": 2, "\u2581sat": 3}
    rust = tokenizers.Tokenizer(models.WordLevel(words, unk_token=tokenizer.END_OF_TEXT))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = tokenizer.Tokenizer(rust, tokenizer.END_OF_TEXT, splits_at_blanks=False)
    monkeypatch.setattr(generate, "Generator", lambda *args: Sat(source.cfg.model))
    lm = lm_eval_model.CheckpointLM(source, text)
    ask = [("the cat", {}), ("the cat", {"until": [" sat"]}), ("the cat", {"max_gen_toks": 0})]
    answers = lm.generate_until(requests("generate_until", *ask), disable_tqdm=True)
    assert answers == [" sat", "", ""]


@pytest.mark.slow
def test_many_contexts_are_answered_in_their_order(lm):
    contexts = ["Friends", "a much longer context than that", "Rom", "lend me your ears", "I"]
    ask = [(c, {"max_gen_toks": 6}) for c in contexts]
    together = lm.generate_until(requests("generate_until", *ask), disable_tqdm=True)
    alone = [lm.generate_until(requests("generate_until", a), disable_tqdm=True)[0] for a in ask]
    assert together == alone and len(set(alone)) > 1


def write_task(folder, lm):
    """Write a task whose answers are right for every other question, and return its score."""
    (folder / "tasks").mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    lines = []
    for i in range(8):
        question = "".join(chr(c) for c in rng.integers(97, 123, 12))
        choices = ["".join(chr(c) for c in rng.integers(97, 123, 4)) for _ in range(3)]
        pairs = [(question, f" {choice}") for choice in choices]
        answers = lm.loglikelihood(requests("loglikelihood", *pairs), disable_tqdm=True)
        best = int(np.argmax([total for total, _ in answers]))
        answer = best if i % 2 else (best + 1) % 3
        lines.append(json.dumps({"question": question, "choices": choices, "answer": answer}))
    (folder / "questions.jsonl").write_text("\n".join(lines))
    path = json.dumps(str(folder / "questions.jsonl"))
    (folder / "tasks" / "tiny.yaml").write_text(TASK.replace("QUESTIONS", path))
    return 0.5


@pytest.mark.slow
def test_a_local_task_runs_offline_through_the_command(folder, lm):
    """In a process of its own whose every connection is refused."""
    score = write_task(folder, lm)
    blocked = (
        "import socket, sys\n"
        "def refuse(*args, **kwargs): raise AssertionError('a connection')\n"
        "socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse\n"
        "from gpt3jax.evaluate import __main__ as evaluate\n"
        "sys.exit(evaluate.main())\n"
    )
    args = ["--checkpoint", "checkpoint", "--vocab-file", "vocab.json", "--merge-file"]
    args += ["merges.txt", "--tasks", "tiny_choice", "--task-folder", "tasks"]
    args += ["--json", "results.json", "--mesh.cpu-devices", "2"]
    done = subprocess.run(
        [sys.executable, "-c", blocked, *args], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "|tiny_choice|" in done.stdout and "|acc" in done.stdout
    results = json.loads((folder / "results.json").read_text())
    assert results["results"]["tiny_choice"]["acc,none"] == score


@pytest.mark.slow
@pytest.mark.parametrize(
    ("tasks", "task_folder", "message"),
    [
        ("no_such_task", "", "--tasks has 'no_such_task', which lm-eval does not know"),
        ("tiny_choice", "no_folder", "--task-folder=no_folder is no folder"),
    ],
)
def test_tasks_that_are_not_there_are_refused(lm, tasks, task_folder, message):
    with pytest.raises(errors.UserError, match=message):
        lm_eval_model.run(lm, [tasks], task_folder, -1, 0)
