"""`gpt3jax.sample`: text on the terminal, the same as Hugging Face's, or one clear line."""

import pathlib
import sys

import jax
import numpy as np
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers

from gpt3jax import errors, step
from gpt3jax.checkpoint import metadata, parameters, storage
from gpt3jax.config import schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.data import tokenizer, tokenizer_sources, tokenizer_training
from gpt3jax.model import gpt
from gpt3jax.sample import __main__ as sample
from gpt3jax.sample import generate, sampling_options
from gpt3jax.sample import options as sample_options

import tiny

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
ROMAN = "Friends, Romans"


@pytest.fixture(scope="module")
def bpe(tmp_path_factory):
    """Return GPT-2's two files for a vocabulary of 257: a token for each byte."""
    folder = tmp_path_factory.mktemp("bpe")
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer_training.train(["no merges"], 257, *files)
    return files


@pytest.fixture(scope="module")
def checkpoint_dir(tmp_path_factory, bpe):
    """Return a checkpoint of the golden GPT-2, with that tokenizer."""
    folder = tmp_path_factory.mktemp("hf") / "checkpoint"
    convert.from_hf(convert.FromHf(folder=str(GOLDEN / "hf_gpt2"), output=str(folder)))
    return str(folder)


def run(monkeypatch, capsys, *args):
    """Return the exit status, what was printed, and the error lines."""
    monkeypatch.setattr(sys, "argv", ["sample", *args])
    status = sample.main()
    printed = capsys.readouterr()
    return status, printed.out, printed.err


def files_of(bpe):
    return ["--vocab-file", bpe[0], "--merge-file", bpe[1]]


def test_a_prompt_ends_where_its_line_does_and_nowhere_else(tmp_path):
    file = tmp_path / "prompts.txt"
    file.write_bytes("\ufeffone\u2028two\x0cthree\x85\rfour\r\n\nfive\ufeff".encode())
    prompts = sample_options.read_prompts(sample_options.Options(checkpoint="", prompts=str(file)))
    assert prompts == ["one\u2028two\x0cthree\x85\rfour", "five\ufeff"]


GREEDY = ["--temperature", "0", "--max-new-tokens", "8"]


@pytest.mark.slow
def test_prompts_are_continued_alone_and_from_a_file(
    checkpoint_dir, bpe, tmp_path, monkeypatch, capsys
):
    common = ["--checkpoint", checkpoint_dir, *files_of(bpe), *GREEDY]
    status, alone, err = run(monkeypatch, capsys, *common, "--prompt", ROMAN)
    assert status == 0 and alone.startswith(ROMAN) and len(alone) > len(ROMAN)
    assert "8 tokens in " in err and " tokens/s" in err
    (tmp_path / "prompts.txt").write_text(f"{ROMAN}\n\ncountrymen\n")
    mesh = ["--mesh.data", "2", "--mesh.stage", "2", "--mesh.tensor", "2"]
    _, both, _ = run(
        monkeypatch, capsys, *common, *mesh, "--prompts", str(tmp_path / "prompts.txt")
    )
    assert both.startswith(alone) and both[len(alone) :].startswith("countrymen")


def test_a_terminal_is_asked_until_it_ends(checkpoint_dir, bpe, monkeypatch, capsys):
    """A prompt that cannot be continued gets an error line, and the next one is asked for."""
    answers = iter(["x" * 64, "", ROMAN])

    def ask(prompt):
        try:
            return next(answers)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    args = ["--checkpoint", checkpoint_dir, *files_of(bpe), *GREEDY]
    status, out, err = run(monkeypatch, capsys, *args)
    assert status == 0 and out.startswith(ROMAN) and "a prompt has 64 tokens" in err


def test_text_that_fills_the_context_says_so(checkpoint_dir, bpe, monkeypatch, capsys):
    args = ["--checkpoint", checkpoint_dir, *files_of(bpe), "--n", "2", "--prompt", "x" * 60]
    args += ["--ignore-eod"]
    _, _, err = run(monkeypatch, capsys, *args)
    assert "[8 tokens in " in err
    assert "[2 stopped where the context of 64 tokens was full]" in err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--prompt", "x"], "names no tokenizer (data.vocab_file, data.tokenizer): give"),
        (["--prompt", "x", "--prompts", "f"], "--prompt, --prompts and --serve exclude each other"),
        (["--prompts", "missing.txt"], "--prompts=missing.txt cannot be read"),
        ([], "nothing to continue: give --prompt, --prompts or --serve"),
        (["--prompt", "x", "--top-p", "2"], "--top-p=2.0 must be above 0 and at most 1"),
        (["--prompt", "x", "--n", "0"], "--n=0 must be at least 1"),
        (["--prompt", "x", "--top-p", "nan"], "--top-p=nan must be above 0 and at most 1"),
        (["--prompt", "x", "--temperature", "nan"], "temperature=nan must be at least 0"),
        (["--prompt", "x", "--temperature", "inf"], "temperature=inf must be at least 0"),
        (["--prompt", "x", "--seed", "-1"], "seed=-1 must be at least 0"),
        (["--prompt", "x", "--seed", str(2**32)], "seed=4294967296 must be at least 0"),
        (["--prompt", "x", "--top-k", "-1"], "--top-k=-1 must be at least 0"),
        (["--prompt", "x", "--max-new-tokens", "0"], "--max-new-tokens=0 must be at least 1"),
        (["--prompt", "x", "--max-new-tokens", "-1"], "--max-new-tokens=-1 must be at least 0"),
        (["--serve", "--server.max-queue", "0"], "--server.max-queue=0 must be at least 1"),
        (["--serve", "--server.max-body-bytes", "-1"], "--server.max-body-bytes=-1 must be"),
        (["--prompt", "x", "--mesh.tensor", "3"], "mesh: "),
        (["--prompt", "x" * 64, "BPE"], "a prompt has 64 tokens, and model.seq_len=64"),
        (["--serve", "--seed", "1"], "--serve takes the sampling options from each request"),
    ],
)
def test_what_cannot_be_done_is_one_line(checkpoint_dir, bpe, monkeypatch, capsys, args, message):
    args = [a for arg in args for a in (files_of(bpe) if arg == "BPE" else [arg])]
    monkeypatch.setattr("sys.stdin.isatty", lambda: False, raising=False)
    status, out, err = run(monkeypatch, capsys, "--checkpoint", checkpoint_dir, *args)
    assert status == 2 and message in err and len(err.splitlines()) == 1 and not out


class Sat(generate.Generator):
    """Continues every prompt with one word, without a network."""

    def __init__(self):
        self.model, self.eod_id = tiny.make_config().model, 0

    def steps(self, rows, *, scored):  # noqa: D102
        for token in (3, 0):
            yield generate.Step([[token]] * len(rows), [[]] * len(rows))


@pytest.fixture
def sat(monkeypatch):
    """Load a tokenizer of SentencePiece's kind, whose words begin with their space."""
    words = {tokenizer.END_OF_TEXT: 0, "\u2581the": 1, "\u2581cat": 2, "\u2581sat": 3}
    rust = tokenizers.Tokenizer(models.WordLevel(words, unk_token=tokenizer.END_OF_TEXT))
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    text = tokenizer.Tokenizer(rust, tokenizer.END_OF_TEXT, splits_at_blanks=False)
    monkeypatch.setattr(sample, "load", lambda options: (Sat(), text))


@pytest.mark.parametrize("prompts", [["the cat"], ["the cat", ""]])
def test_the_space_behind_the_prompt_is_printed(sat, monkeypatch, capsys, prompts):
    """As it comes, and in a batch; an empty prompt is continued from the end-of-text token."""
    status, out, _ = run(monkeypatch, capsys, "--checkpoint", "x", "--prompt", *prompts)
    assert status == 0 and out.splitlines() == ["the cat sat", " sat"][: len(prompts)]


def test_a_prompt_that_is_no_text_is_one_line(sat, monkeypatch, capsys):
    status, _, err = run(monkeypatch, capsys, "--checkpoint", "x", "--prompt", "a\udcff")
    assert status == 2 and "--prompt is not UTF-8 text" in err and len(err.splitlines()) == 1


def test_a_tokenizer_larger_than_the_model_is_refused(checkpoint_dir):
    golden = GOLDEN / "gpt2"
    source = tokenizer_sources.Source(
        vocab_file=str(golden / "vocab.json"), merge_file=str(golden / "merges.txt")
    )
    options = sample_options.Options(checkpoint=checkpoint_dir, prompt=("x",), source=source)
    with pytest.raises(errors.UserError, match="tokens and the model"):
        sample.load(options)


@pytest.mark.slower
def test_hugging_face_generates_the_same_tokens(tmp_path):
    """200 tokens, greedily, of a model that is exported from a checkpoint with random weights."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    cfg = tiny.make_config(model={"seq_len": 256, "init_std": 0.15})
    mesh = tiny.one_device_mesh()
    program = step.build(cfg, mesh, 1)
    noise = iter(jax.random.split(jax.random.key(1), 100))
    params = gpt.GPT(cfg.model, jax.random.key(0))
    params = jax.tree.map(lambda x: x + 0.1 * jax.random.normal(next(noise), x.shape), params)
    store = storage.Checkpoints(str(tmp_path / "ours"))
    meta = metadata.Meta(step=0, consumed_samples=0, data_order={}, config=schema.flatten(cfg))
    store.save(program.adopt(params), meta)
    assert store.poll(wait=True) == ""
    out = str(tmp_path / "theirs")
    convert.to_hf(convert.ToHf(checkpoint=str(tmp_path / "ours"), output=out))
    source = parameters.open_newest(str(tmp_path / "ours"), mesh)
    generator = generate.Generator(source.params(), source.program.compute, mesh, -1)
    prompts = np.random.default_rng(0).integers(1, 500, (2, 24)).tolist()
    greedy = sampling_options.Options(temperature=0.0, max_new_tokens=200)
    rows = [generate.Row(prompt=p, options=greedy, number=i) for i, p in enumerate(prompts)]
    generated = [[], []]
    for new in generator.stream(rows):
        for ids, tokens in zip(generated, new, strict=True):
            ids.extend(tokens)
    theirs = transformers.GPT2LMHeadModel.from_pretrained(out).eval()
    expected = theirs.generate(
        torch.tensor(prompts), max_new_tokens=200, do_sample=False, pad_token_id=0,
        eos_token_id=None, use_cache=True,
    )  # fmt: skip
    assert len(generated[0]) == 200 and len(set(generated[0])) > 20
    assert generated == expected[:, 24:].tolist()
