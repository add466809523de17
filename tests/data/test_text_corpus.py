"""A corpus made from text on first use: once, whole, and with a tokenizer that fits."""

import dataclasses
import pathlib
import threading

import numpy as np
import pytest

from gpt3jax import errors
from gpt3jax.config import schema
from gpt3jax.data import indexed, text_corpus, tokenizer, tokenizer_sources, tokenizer_training

MODEL = schema.Model(n_layers=1, d_model=8, n_heads=1, seq_len=8, vocab_size=300)


@pytest.fixture
def folder(tmp_path):
    """Return a folder of three texts, an empty file, and a binary one."""
    source = tmp_path / "source"
    (source / "sub").mkdir(parents=True)
    for name in ("a.txt", "b", "sub/c.md"):
        (source / name).write_text(f"this is {name}, the text, the text\r\n" * 9, newline="")
    (source / "empty").touch()
    (source / "image.png").write_bytes(b"\x89PNG\xff\xfe")
    return source


@pytest.fixture
def data(tmp_path, folder):
    return schema.Data(
        paths=(str(tmp_path / "out" / "corpus"),),
        from_text=str(folder),
        vocab_file=str(tmp_path / "out" / "vocab.json"),
        merge_file=str(tmp_path / "out" / "merges.txt"),
        eod_id=0,
    )


def documents(data):
    corpus = indexed.IndexedCorpus(data.paths[0])
    bpe = tokenizer_sources.from_files(data.vocab_file, data.merge_file)
    return [bpe.decode(corpus.read(i).tolist()) for i in range(len(corpus))]


def test_each_text_is_a_document_with_its_end(data, folder):
    text_corpus.ensure_corpus(data, MODEL)
    assert sorted(documents(data)) == sorted(
        (folder / name).read_bytes().decode() + "<|endoftext|>"
        for name in ("a.txt", "b", "sub/c.md")
    )
    corpus = indexed.IndexedCorpus(data.paths[0])
    assert corpus.dtype == np.uint16
    assert [int(corpus.read(i)[-1]) for i in range(3)] == [0, 0, 0]
    left = sorted(path.name for path in pathlib.Path(data.paths[0]).parent.iterdir())
    assert left == ["corpus.bin", "corpus.idx", "merges.txt", "vocab.json"]


def test_hidden_files_are_no_text_and_others_are_not_dropped_without_a_word(data, folder, capsys):
    for name in (".git/config", "sub/.c.md.swp"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text("hidden")
    (folder / "a.txt").write_bytes(b"\xef\xbb\xbf" + (folder / "a.txt").read_bytes())
    text_corpus.ensure_corpus(data, MODEL)
    assert len(documents(data)) == 3
    assert not any("hidden" in t or "\ufeff" in t for t in documents(data))
    assert "1 of 5 files are not UTF-8 and were left out" in capsys.readouterr().err


def test_a_tokenizer_json_serves_in_place_of_the_two_files(data, folder, tmp_path):
    text_corpus.ensure_corpus(data, MODEL)
    rust = tokenizer_sources.from_files(data.vocab_file, data.merge_file).backend
    rust.add_special_tokens(["<end>"])
    rust.save(str(tmp_path / "tokenizer.json"))
    end = rust.token_to_id("<end>")
    files = {"tokenizer": str(tmp_path / "tokenizer.json"), "vocab_file": "", "merge_file": ""}
    again = dataclasses.replace(data, **files, eod_id=end, paths=(str(tmp_path / "again"),))
    model = dataclasses.replace(MODEL, vocab_size=end + 1)
    text_corpus.ensure_corpus(again, model)
    ours, theirs = (indexed.IndexedCorpus(d.paths[0]).read(0) for d in (data, again))
    np.testing.assert_array_equal(ours[:-1], theirs[:-1])
    assert (ours[-1], theirs[-1]) == (0, end)
    with pytest.raises(errors.UserError, match=r"tokenizer.json has \d+ tokens, more than model"):
        text_corpus.check_vocabulary(again, dataclasses.replace(MODEL, vocab_size=end))
    message = r"tokenizer.json has <\|endoftext\|> as 0, but data.eod_id=50256: set data.eod_id=0"
    with pytest.raises(errors.UserError, match=message):
        text_corpus.check_vocabulary(dataclasses.replace(again, eod_id=50_256), model)
    with pytest.raises(errors.UserError, match=r"data.tokenizer=no: no such file"):
        text_corpus.check_vocabulary(dataclasses.replace(again, tokenizer="no"), model)
    message = r"eod_id=65 is an ordinary token of .* of 0 \(<\|endoftext\|>\), \d+ \(<end>\)"
    with pytest.raises(errors.UserError, match=message):
        text_corpus.check_vocabulary(dataclasses.replace(again, eod_id=65), model)


def test_the_order_depends_on_relative_names_alone(data, folder, tmp_path, monkeypatch):
    text_corpus.ensure_corpus(data, MODEL)
    moved = folder.rename(tmp_path / "elsewhere")
    rglob = pathlib.Path.rglob  # another file system lists them in another order
    monkeypatch.setattr(pathlib.Path, "rglob", lambda *args: reversed(list(rglob(*args))))
    again = dataclasses.replace(data, from_text=str(moved), paths=(str(tmp_path / "again"),))
    text_corpus.ensure_corpus(again, MODEL)
    for end in (".bin", ".idx"):
        ours = pathlib.Path(again.paths[0] + end).read_bytes()
        assert ours == pathlib.Path(data.paths[0] + end).read_bytes()


def test_the_order_is_not_that_of_the_names(tmp_path):
    for i in range(30):
        (tmp_path / f"{i:02}").write_text("x")
    names = [path.name for path in text_corpus.text_files(str(tmp_path))]
    assert sorted(names) == [f"{i:02}" for i in range(30)] != names


def test_a_corpus_that_is_there_is_left_alone(data, folder):
    text_corpus.ensure_corpus(data, MODEL)
    before = pathlib.Path(data.paths[0] + ".bin").stat()
    (folder / "new").write_text("new")
    text_corpus.ensure_corpus(data, MODEL)
    assert pathlib.Path(data.paths[0] + ".bin").stat() == before
    text_corpus.ensure_corpus(dataclasses.replace(data, from_text=""), MODEL)


def test_half_a_corpus_is_made_again(data):
    text_corpus.ensure_corpus(data, MODEL)
    whole = pathlib.Path(data.paths[0] + ".bin").read_bytes()
    for end in (".bin", ".idx"):
        pathlib.Path(data.paths[0] + end).unlink()
        text_corpus.ensure_corpus(data, MODEL)
        assert pathlib.Path(data.paths[0] + ".bin").read_bytes() == whole
        assert len(documents(data)) == 3


def test_interrupted_it_starts_anew(data, monkeypatch):
    def killed(*_):
        raise KeyboardInterrupt

    for target, name in (
        (tokenizer.Tokenizer, "encode_batch"),
        (indexed, "write_index"),
        (pathlib.Path, "replace"),
    ):
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(target, name, killed)
            text_corpus.ensure_corpus(data, MODEL)
        assert not pathlib.Path(data.paths[0] + ".idx").exists()
    text_corpus.ensure_corpus(data, MODEL)
    assert len(documents(data)) == 3


def test_of_several_processes_one_makes_it(data, monkeypatch):
    trained, train = [], tokenizer_training.train
    monkeypatch.setattr(
        tokenizer_training, "train", lambda *args: (trained.append(1), train(*args))
    )
    threads = [
        threading.Thread(target=text_corpus.ensure_corpus, args=(data, MODEL)) for _ in range(4)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(trained) == 1
    assert len(documents(data)) == 3


def test_a_users_tokenizer_is_used_and_never_overwritten(data, tmp_path):
    tokenizer_training.train(["aaaa bbbb " * 50], 260, data.vocab_file, data.merge_file)
    files = [pathlib.Path(path) for path in (data.vocab_file, data.merge_file)]
    before = [path.read_bytes() for path in files]
    text_corpus.ensure_corpus(data, MODEL)
    assert [path.read_bytes() for path in files] == before
    assert len(documents(data)) == 3
    files[0].unlink()
    other = dataclasses.replace(data, paths=(str(tmp_path / "other"),))
    with pytest.raises(errors.UserError, match=r"vocab\.json: no such file"):
        text_corpus.ensure_corpus(other, MODEL)
    assert files[1].read_bytes() == before[1]


def test_a_tokenizer_that_does_not_fit_is_refused_before_the_corpus_is_made(data):
    tokenizer_training.train(["the text, the text"], 263, data.vocab_file, data.merge_file)
    with pytest.raises(errors.UserError, match=r"has 263 tokens, .*: set model.vocab_size=263"):
        text_corpus.ensure_corpus(data, dataclasses.replace(MODEL, vocab_size=262))
    with pytest.raises(errors.UserError, match=r"<\|endoftext\|> as 0, .* set data.eod_id=0"):
        text_corpus.ensure_corpus(dataclasses.replace(data, eod_id=5), MODEL)
    assert not pathlib.Path(data.paths[0] + ".bin").exists()


def test_a_vocabulary_may_be_smaller_than_the_models(data):
    tokenizer_training.train(["the text, the text"], 263, data.vocab_file, data.merge_file)
    text_corpus.check_vocabulary(data, MODEL)
    text_corpus.check_vocabulary(data, dataclasses.replace(MODEL, vocab_size=263))
    text_corpus.check_vocabulary(schema.Data(), MODEL)  # without one there is nothing to check


def test_what_is_missing_is_named(data, tmp_path):
    with pytest.raises(errors.UserError, match=r"data.from_text needs data.vocab_file"):
        text_corpus.ensure_corpus(dataclasses.replace(data, vocab_file="", merge_file=""), MODEL)
    for source in ("nowhere", "bare"):
        (tmp_path / "bare").mkdir(exist_ok=True)
        with pytest.raises(errors.UserError, match=rf"from_text='.*{source}': there are no files"):
            text_corpus.ensure_corpus(
                dataclasses.replace(data, from_text=str(tmp_path / source)), MODEL
            )
    (tmp_path / "bare" / "image").write_bytes(b"\xff")
    with pytest.raises(errors.UserError, match=r"none of its 1 files is UTF-8 text"):
        text_corpus.ensure_corpus(
            dataclasses.replace(data, from_text=str(tmp_path / "bare")), MODEL
        )
    assert not pathlib.Path(data.paths[0] + ".bin").exists()


def test_pythons_library_is_bounded_and_without_tests(monkeypatch):
    files = text_corpus.text_files(text_corpus.PYTHON)
    sizes = [path.stat().st_size for path in files]
    assert len(files) > 100
    assert sum(sizes) <= text_corpus.PYTHON_BYTES
    assert all(path.suffix == ".py" for path in files)
    for left_out in ("site-packages", "test", "tests", "idlelib", "lib2to3", "__pycache__"):
        assert not any(left_out in path.parts for path in files), left_out
    monkeypatch.setattr(text_corpus, "PYTHON_BYTES", sum(sizes[:20]) + 1)
    assert text_corpus.text_files(text_corpus.PYTHON) == files[:20]


@pytest.mark.parametrize("dtype", [np.uint16, np.int32])
def test_unigram_entropy_is_in_nats(tmp_path, dtype):
    prefix = str(tmp_path / "c")
    with indexed.Writer(prefix, dtype) as writer:
        writer.add_document([[1, 1, 7, 300], [7] * 100])
    corpus = indexed.IndexedCorpus(prefix)
    expected = 0.5 * np.log(2) + 2 * 0.25 * np.log(4)
    assert text_corpus.unigram_entropy(corpus, 4) == pytest.approx(expected)
    assert text_corpus.unigram_entropy(corpus) < expected
    assert text_corpus.unigram_entropy(corpus, 2) == 0


def test_entropy_of_strange_tokens_takes_no_memory_and_of_none_is_zero(tmp_path):
    prefix = str(tmp_path / "c")
    with indexed.Writer(prefix, np.int32) as writer:
        writer.add_document([[-5, 2_000_000_000]])
    assert text_corpus.unigram_entropy(indexed.IndexedCorpus(prefix)) == pytest.approx(np.log(2))
    with indexed.Writer(prefix, np.int32):
        pass
    assert text_corpus.unigram_entropy(indexed.IndexedCorpus(prefix)) == 0
