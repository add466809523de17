"""Text from tokens as they come: the same as all at once, whatever the tokenizer's decoder."""

import hypothesis
import pytest
import tokenizers
from hypothesis import strategies as st
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from gpt3jax.data import tokenizer, tokenizer_sources, tokenizer_training
from gpt3jax.sample import generated_text

TEXT = "the cat sat on the mat, na\u00efve \u65e5\u672c\u8a9e \U0001f680  two spaces\nthe end\u00e9"
END = tokenizer.END_OF_TEXT


def byte_level(folder):
    files = str(folder / "vocab.json"), str(folder / "merges.txt")
    tokenizer_training.train(["no merges"], 257, *files)
    return tokenizer_sources.from_files(*files)


def metaspace(folder):
    """SentencePiece's way in `tokenizers`: a word's token begins with the space before it."""
    rust = tokenizers.Tokenizer(models.BPE())
    rust.pre_tokenizer, rust.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.BpeTrainer(vocab_size=200, special_tokens=[END], show_progress=False)
    rust.train_from_iterator([TEXT] * 9, trainer)
    return tokenizer.Tokenizer(rust, END, splits_at_blanks=False)


def byte_fallback(folder):
    """Llama's way: as above, and what the vocabulary lacks becomes bytes."""
    pieces = [END, *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *"acehnostdm,"]
    merges = [("t", "h"), ("th", "e"), ("\u2581", "the"), ("\u2581", "s"), ("a", "t")]
    pieces += ["".join(merge) for merge in merges]
    bpe = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, byte_fallback=True)
    rust = tokenizers.Tokenizer(bpe)
    rust.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    rust.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )  # fmt: skip
    rust.add_special_tokens([END])
    return tokenizer.Tokenizer(rust, END, splits_at_blanks=False)


@pytest.fixture(scope="module", params=[byte_level, metaspace, byte_fallback])
def text(request, tmp_path_factory):
    return request.param(tmp_path_factory.mktemp("tokenizer"))


def grow(text, ids, before=(), stops=(), cut=1):
    """Return the parts of a row's text, `cut` tokens at a time."""
    row = generated_text.GeneratedText(text, before, len(ids), stops)
    parts = [row.add(ids[i : i + cut]) for i in range(0, len(ids), cut)]
    assert row.reason == "length" or stops
    return parts


@pytest.mark.parametrize("cut", [1, 2, 3, 8])
def test_streamed_text_is_the_whole_text(text, cut):
    ids = text.encode(TEXT)
    parts = grow(text, ids, cut=cut)
    assert "".join(parts) == TEXT and "\ufffd" not in "".join(parts)


def test_text_goes_on_where_the_prompt_ends(text):
    """The space between the two is kept, and a character that the cut divides comes whole."""
    ids = text.encode(TEXT)
    for n in range(1, len(ids)):
        prompt = tokenizer.TextStream(text)
        assert prompt.add(ids[:n]) + "".join(grow(text, ids[n:], ids[:n], cut=8)) == TEXT, n


def test_half_a_character_waits_and_is_shown_at_the_end(tmp_path):
    for text in (byte_level(tmp_path), byte_fallback(tmp_path)):
        half = text.encode("\u65e5")[-3:-1]
        stream = tokenizer.TextStream(text)
        assert stream.add(half) == "" == stream.add([])
        assert set(stream.end()) == {"\ufffd"}


def test_bytes_that_are_no_text_do_not_hold_up_the_rest(tmp_path):
    for text in (byte_level(tmp_path), byte_fallback(tmp_path)):
        stream = tokenizer.TextStream(text)
        broken = text.encode("\u65e5")[-2:] * 3  # continuation bytes alone
        shown = stream.add(broken) + stream.add(text.encode("at"))
        assert shown.endswith("at") and shown.count("\ufffd") == 6


def test_a_broken_character_does_not_spoil_those_before_it(tmp_path):
    text = byte_fallback(tmp_path)
    before, half = text.encode("\u65e5\u672c"), text.encode("\u8a9e")[-3:-1]
    stream = tokenizer.TextStream(text)
    shown = stream.add([*before, *half]) + stream.add(text.encode("the"))
    assert shown.startswith("\u65e5\u672c\ufffd") and shown.endswith("the")


@hypothesis.given(data=st.data())
@hypothesis.settings(
    max_examples=60, suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture]
)
def test_parts_of_any_tokens_add_up_to_the_same_text(text, data):
    token = st.integers(0, text.vocab_size - 1).filter(lambda i: i != text.eod_id)
    ids = data.draw(st.text().map(text.encode) | st.lists(token, max_size=30))
    n = data.draw(st.integers(0, len(ids)))
    prompt = tokenizer.TextStream(text)
    start = prompt.add(ids[:n])
    parts = [grow(text, ids[n:], ids[:n], cut=cut) for cut in (1, 8)]
    if "\ufffd" not in text.decode(ids):
        assert {start + "".join(p) for p in parts} == {text.decode(ids)}


@pytest.mark.parametrize("stops", [("sat",), ("never", "t on"), (" the m", "mat"), ()])
def test_text_ends_before_the_first_stop(text, stops):
    ids = text.encode(TEXT)
    expected = TEXT[: min((TEXT.find(stop) for stop in stops if stop in TEXT), default=None)]
    for cut in (1, 8):
        assert "".join(grow(text, ids, stops=stops, cut=cut)) == expected
    row = generated_text.GeneratedText(text, (), len(ids) + 1, stops)
    row.add(ids)
    assert row.reason == ("stop" if stops else "") and len(row.tokens) < len(ids) + bool(not stops)


def test_a_row_ends_with_the_end_of_text_or_at_its_limit(text):
    ids = [*text.encode("the cat"), text.eod_id, *text.encode("sat")]
    row = generated_text.GeneratedText(text, (), 100)
    assert row.add(ids) == "the cat" and row.reason == "stop" and row.tokens[-1] == text.eod_id
    row = generated_text.GeneratedText(text, (), 100, ignore_eod=True)
    assert END in row.add(ids) and not row.reason
    row = generated_text.GeneratedText(text, (), 1)
    assert row.add(ids) and row.reason == "length" and row.tokens == ids[:1]
    assert generated_text.GeneratedText(text, (), 0).reason == "length"


def test_offsets_are_where_each_tokens_text_begins(text):
    ids = text.encode(TEXT)
    row = generated_text.GeneratedText(text, (), len(ids))
    row.add(ids)
    assert len(row.offsets) == len(ids) and row.offsets == sorted(row.offsets)
    for token, offset in zip(ids, row.offsets, strict=True):
        shown = text.token_text(token)
        if "\ufffd" not in shown and offset:
            assert TEXT[offset:].startswith(shown)


def test_a_tokens_own_text_keeps_its_space(text):
    [*_, last] = text.encode("sat the")
    assert (
        text.token_text(last) == text.decode(text.encode("sat the"))[-len(text.token_text(last)) :]
    )
    if text.decode([last]) == "the":
        assert text.token_text(last) == " the"
