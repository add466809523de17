"""Training a tokenizer: the same files each time, of the right size, and whole or absent."""

import pathlib

import pytest

from gpt3jax import errors
from gpt3jax.data import tokenizer_sources, tokenizer_training

import corpus

TEXT = [
    "The cat sat on the mat; the cat's hat isn't flat. 123 cats, 4567 hats!\n",
    "naïve café — Ωμέγα, 日本語, 🙂🙂 \u200b\x00\x7f",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return corpus.train_tokenizer(tmp_path_factory.mktemp("bpe"), TEXT)


def test_training_again_gives_the_same_files(files, tmp_path):
    again = str(tmp_path / "v" / "vocab.json"), str(tmp_path / "m" / "merges.txt")
    tokenizer_training.train(iter(TEXT * 5), 400, *again)
    for path, new in zip(files, again, strict=True):
        assert pathlib.Path(path).read_bytes() == pathlib.Path(new).read_bytes()
        assert len(list(pathlib.Path(new).parent.iterdir())) == 1


def test_training_gives_the_size_asked_for_or_what_the_text_allows(files, tmp_path):
    paths = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    tokenizer_training.train(TEXT * 5, 300, *paths)
    assert tokenizer_sources.from_files(*paths).vocab_size == 300
    tokenizer_training.train([], 300, *paths)
    assert tokenizer_sources.from_files(*paths).vocab_size == 257
    of_bytes = tokenizer_sources.from_files(*paths)
    assert of_bytes.decode(of_bytes.encode("é")) == "é"
    with pytest.raises(errors.UserError, match=r"model.vocab_size=256 is too small.* 257 or more"):
        tokenizer_training.train(TEXT, 256, *paths)
    assert tokenizer_sources.from_files(*files).vocab_size <= 400


def test_training_that_was_interrupted_does_not_count(files, tmp_path, monkeypatch):
    paths = str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt")
    assert tokenizer_training.exists(*files)
    assert not tokenizer_training.exists(*paths)
    replace = pathlib.Path.replace
    for n_before in (0, 1):
        left = [n_before]

        def killed(path, target, left=left):
            if not left[0]:
                raise KeyboardInterrupt
            left[0] -= 1
            return replace(path, target)

        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(pathlib.Path, "replace", killed)
            tokenizer_training.train(TEXT, 300, *paths)
        assert not tokenizer_training.exists(*paths)
    tokenizer_training.train(TEXT, 300, *paths)
    assert tokenizer_training.exists(*paths)
    pathlib.Path(paths[0]).unlink()
    assert tokenizer_training.exists(*paths)  # half of a user's pair: to be fixed, not overwritten
