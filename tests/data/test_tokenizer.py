"""GPT-2's tokenizer: Megatron's own tokens, an independent BPE, and files that are not one."""

import functools
import itertools
import json
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpt3jax import errors
from gpt3jax.data import tokenizer_sources

import corpus

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GPT2 = (str(GOLDEN / "gpt2" / "vocab.json"), str(GOLDEN / "gpt2" / "merges.txt"))
TEXT = [
    "The cat sat on the mat; the cat's hat isn't flat. 123 cats, 4567 hats!\n",
    "def f(x):\n    return x + 1  # one\n\n\nclass A:\n\tpass\n",
    "naïve café — Ωμέγα, 日本語, 🙂🙂 \u200b\x00\x7f",
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return corpus.train_tokenizer(tmp_path_factory.mktemp("bpe"), TEXT)


@pytest.fixture(scope="module")
def bpe(files):
    return tokenizer_sources.from_files(*files)


def test_gpt2_is_gpt2():
    gpt2 = tokenizer_sources.from_files(*GPT2)
    assert (gpt2.vocab_size, gpt2.eod_id) == (50_257, 50_256)
    assert gpt2.encode("Hello world") == [15496, 995]
    assert gpt2.encode("a<|endoftext|>b") == [64, 50256, 65]


# GPT-2's cut of ASCII text into words, where \p{L} is [a-zA-Z] and \p{N} is [0-9].
WORDS = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d| ?[a-zA-Z]+| ?[0-9]+| ?[^\sa-zA-Z0-9]+|\s+(?!\S)|\s+")


def slow_encode(text, vocab, ranks):
    """Join, in each word, the pair that was learned first, until no pair was learned."""
    ids = []
    shift = {chr(i): chr(i if 33 <= i <= 126 else 256 + i) for i in range(33)}
    for word in WORDS.findall(text):
        parts = [shift.get(c, c) for c in word]
        while pairs := [p for p in itertools.pairwise(parts) if p in ranks]:
            best, i = min(pairs, key=ranks.__getitem__), 0
            while i < len(parts) - 1:
                if (parts[i], parts[i + 1]) == best:
                    parts[i : i + 2] = ["".join(best)]
                i += 1
        ids += [vocab[part] for part in parts]
    return ids


@functools.cache
def rules(vocab_file, merge_file):
    merges = pathlib.Path(merge_file).read_text(encoding="utf-8").splitlines()
    assert merges[0] == "#version: 0.2"
    ranks = {tuple(merge.split(" ")): i for i, merge in enumerate(merges[1:])}
    return json.loads(pathlib.Path(vocab_file).read_text(encoding="utf-8")), ranks


@given(st.text(alphabet="the cats'll 12.;\n\t()", max_size=60))
def test_tokens_are_those_of_a_slow_bpe(bpe, files, text):
    assert bpe.encode(text) == slow_encode(text, *rules(*files))


@given(st.text(max_size=40))
def test_text_survives(bpe, text):
    assert bpe.decode(bpe.encode(text)) == text


def test_a_batch_is_encoded_like_each_text(bpe):
    texts = [*TEXT, "", "<|endoftext|>"]
    assert [ids.tolist() for ids in bpe.encode_batch(texts)] == [bpe.encode(t) for t in texts]


def test_end_of_text_inside_a_text_is_one_token(bpe):
    assert bpe.eod_id == 0
    ids = bpe.encode("the cat<|endoftext|> sat")
    assert ids == [*bpe.encode("the cat"), 0, *bpe.encode(" sat")]
    assert bpe.decode(ids) == "the cat<|endoftext|> sat"
    assert bpe.encode("<|endoftext|><|endoftext|>") == [0, 0]
    assert 0 not in bpe.encode("<|endoftext>")


def saved(bpe, path, **changes):
    """Write a tokenizer as a `tokenizer.json` with other values; return the file."""
    content = json.loads(bpe.backend.to_str())
    content["model"] |= changes.pop("model", {})
    path.write_text(json.dumps(content | changes))
    return path


END = "<|endoftext|>"
TEMPLATE = {  # a document's end before and behind each text
    "type": "TemplateProcessing",
    "single": [
        {"SpecialToken": {"id": END, "type_id": 0}},
        {"Sequence": {"id": "A", "type_id": 0}},
        {"SpecialToken": {"id": END, "type_id": 0}},
    ],
    "pair": [],
    "special_tokens": {END: {"id": END, "ids": [0], "tokens": [END]}},
}
TRUNCATION = {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0}
PADDING = {
    "strategy": {"Fixed": 300}, "direction": "Left", "pad_to_multiple_of": 8,
    "pad_id": 0, "pad_type_id": 0, "pad_token": "<|endoftext|>",
}  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        {"truncation": TRUNCATION},
        {"padding": PADDING},
        {"truncation": TRUNCATION, "padding": PADDING},
        {"post_processor": TEMPLATE},
        {"model": {"dropout": 0.5}},
    ],
    ids=["truncation", "padding", "both", "template", "dropout"],
)
def test_tokens_are_those_of_the_whole_text_and_no_others(bpe, tmp_path, change):
    """What a tokenizer.json cuts, pads, adds or varies at random is for training by batches."""
    read = tokenizer_sources.from_pretrained(str(saved(bpe, tmp_path / "tokenizer.json", **change)))
    text = "".join(TEXT)
    for _ in range(3):
        assert read.encode(text) == bpe.encode(text)
        batch = read.encode_batch([text, "the"])
        assert [ids.tolist() for ids in batch] == [bpe.encode(text), bpe.encode("the")]


def test_text_that_is_not_utf8_is_refused(bpe):
    with pytest.raises(errors.UserError, match="is not UTF-8 at character 1: fix it"):
        bpe.encode("a\udcffb")  # as a shell passes the byte 0xff


def folder_of(files, folder):
    folder.mkdir(exist_ok=True)
    for file in files:
        (folder / pathlib.Path(file).name).write_bytes(pathlib.Path(file).read_bytes())
    return folder


def test_tokens_that_a_tokenizer_json_adds_go_before_gpt2s_files(files, bpe, tmp_path):
    folder = folder_of(files, tmp_path / "both")
    rust = type(bpe.backend).from_str(bpe.backend.to_str())
    rust.add_tokens(["<extra>"])
    rust.save(str(folder / "tokenizer.json"))
    read = tokenizer_sources.from_pretrained(str(folder))
    assert read.vocab_size == bpe.vocab_size + 1
    assert read.encode("the<extra>") == [*bpe.encode("the"), bpe.vocab_size]
    assert read.decode([bpe.vocab_size]) == "<extra>"


def other_merges(folder):
    lines = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    (folder / "merges.txt").write_text("\n".join(lines[:-2]), encoding="utf-8")


def other_words(folder):
    vocab = json.loads((folder / "vocab.json").read_text(encoding="utf-8"))
    words = list(vocab)
    words[-2:] = words[-1], words[-2]
    (folder / "vocab.json").write_text(json.dumps({w: i for i, w in enumerate(words)}))


def added(folder):
    (folder / "added_tokens.json").write_text('{"<extra>": 999}')


def decoded(folder):
    entry = {"added_tokens_decoder": {"999": {"content": "<extra>", "special": True}}}
    (folder / "tokenizer_config.json").write_text(json.dumps(entry))


@pytest.mark.parametrize(
    ("change", "with_json", "message"),
    [
        (other_merges, True, "merges.txt is not of the same tokenizer as tokenizer.json beside it"),
        (other_words, True, "vocab.json is not of the same tokenizer as tokenizer.json beside it"),
        (added, True, "added_tokens.json adds the token '<extra>' as 999, which the tokenizer"),
        (added, False, "added_tokens.json adds the token '<extra>' as 999.*write a whole tokenize"),
        (decoded, False, "tokenizer_config.json adds the token '<extra>' as 999"),
    ],
)
def test_a_folder_whose_files_disagree_is_refused(files, bpe, tmp_path, change, with_json, message):
    folder = folder_of(files, tmp_path / "folder")
    if with_json:
        bpe.backend.save(str(folder / "tokenizer.json"))
    tokenizer_sources.from_pretrained(str(folder))
    change(folder)
    with pytest.raises(errors.UserError, match=message):
        tokenizer_sources.from_pretrained(str(folder))


def test_an_end_of_document_that_has_no_effect_is_refused(files):
    with pytest.raises(errors.UserError, match="'the' cannot be the end-of-document token"):
        tokenizer_sources.Source(vocab_file=files[0], merge_file=files[1], eod_token="the").open()


def without(vocab, token):
    return {t: i for i, t in enumerate(t for t in vocab if t != token)}


BAD_VOCAB = {
    "not JSON": (lambda v: "{", r"vocab\.json is not JSON"),
    "a list": (lambda v: json.dumps(list(v)), r"vocab\.json is not a vocabulary"),
    "empty": (lambda v: "{}", r"vocab\.json is not a vocabulary"),
    "words": (lambda v: json.dumps(dict.fromkeys(v, "x")), r"vocab\.json is not a vocabulary"),
    "gaps": (lambda v: json.dumps({t: 2 * i for t, i in v.items()}), r"without gaps"),
    "no end": (lambda v: json.dumps(without(v, "<|endoftext|>")), r"has no <\|endoftext\|>"),
    "no byte": (lambda v: json.dumps(without(v, "a")), r"no token for 1 of the 256 bytes, 'a'"),
    "not text": (lambda v: b"\xff\xfe", r"vocab\.json: 'utf-8' codec can't decode"),
}


@pytest.mark.parametrize("fault", BAD_VOCAB)
def test_a_bad_vocabulary_is_named(files, tmp_path, fault):
    change, message = BAD_VOCAB[fault]
    vocab = json.loads(pathlib.Path(files[0]).read_text(encoding="utf-8"))
    new = change(vocab)
    bad = tmp_path / "vocab.json"
    bad.write_bytes(new if isinstance(new, bytes) else new.encode())
    with pytest.raises(errors.UserError, match=message):
        tokenizer_sources.from_files(str(bad), files[1])


BAD_MERGES = {
    "one word": ("#version: 0.2\nt h\nthe\n", r"merges\.txt:3: 'the' is not a merge"),
    "three words": ("t h e\n", r"merges\.txt:1: 't h e' is not a merge"),
    "unknown token": ("zq xw\n", r"merges\.txt does not belong to .*vocab\.json"),
    "unknown result": ("Z Z\n", r"merges\.txt does not belong to .*vocab\.json"),
}


@pytest.mark.parametrize("fault", BAD_MERGES)
def test_bad_merges_are_named(files, tmp_path, fault):
    text, message = BAD_MERGES[fault]
    bad = tmp_path / "merges.txt"
    bad.write_text(text)
    with pytest.raises(errors.UserError, match=message):
        tokenizer_sources.from_files(files[0], str(bad))


def test_windows_line_ends_do_no_harm(files, bpe, tmp_path):
    crlf = tmp_path / "merges.txt"
    crlf.write_bytes(pathlib.Path(files[1]).read_bytes().replace(b"\n", b"\r\n"))
    assert tokenizer_sources.from_files(files[0], str(crlf)).encode(TEXT[0]) == bpe.encode(TEXT[0])


@pytest.mark.parametrize("which", [0, 1])
def test_a_missing_file_is_named(files, tmp_path, which):
    paths = [str(tmp_path / "no") if i == which else path for i, path in enumerate(files)]
    with pytest.raises(errors.UserError, match=r"no: no such file \(GPT-2's vocab.json and"):
        tokenizer_sources.from_files(*paths)


def test_ids_fit_the_type_they_are_stored_in(bpe):
    ids = np.concatenate([np.array(ids) for ids in bpe.encode_batch(TEXT)])
    assert 0 < ids.max() < bpe.vocab_size
