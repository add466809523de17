"""The corpus format: Megatron's bytes in and out, nothing half-written, damage named."""

import pathlib
import struct

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpt3jax import errors
from gpt3jax.data import indexed

CORPORA = pathlib.Path(__file__).parents[1] / "golden" / "megatron_data" / "corpora"
# Two documents of 3 and 2 uint16 tokens, as Megatron's IndexedDatasetBuilder writes them.
VECTOR = bytes.fromhex(
    "4d4d49444944580000" "0100000000000000" "08" "0200000000000000" "0300000000000000"
    "0300000002000000" "0000000000000000" "0600000000000000"
    "0000000000000000" "0100000000000000" "0200000000000000"
)  # fmt: skip


def write(prefix, documents, dtype=np.uint16):
    with indexed.Writer(str(prefix), dtype) as writer:
        for sequences in documents:
            writer.add_document(sequences)
    return str(prefix)


def test_bytes_are_megatrons(tmp_path):
    prefix = write(tmp_path / "c", [[[1, 2, 3]], [[65535, 5]]])
    assert pathlib.Path(prefix + ".idx").read_bytes() == VECTOR
    assert len(VECTOR) == 82
    assert pathlib.Path(prefix + ".bin").read_bytes() == struct.pack("<5H", 1, 2, 3, 65535, 5)


@pytest.mark.parametrize("name", sorted(path.stem for path in CORPORA.glob("*.idx")))
def test_megatrons_corpora_survive_reading_and_writing(tmp_path, name):
    corpus = indexed.IndexedCorpus(str(CORPORA / name))
    assert corpus.n_tokens == corpus.lengths.sum()
    bounds = zip(corpus.document_indices, corpus.document_indices[1:], strict=False)
    documents = [[corpus.read(i) for i in range(low, high)] for low, high in bounds]
    prefix = write(tmp_path / name, documents, corpus.dtype.type)
    for end in (".idx", ".bin"):
        theirs = (CORPORA / (name + end)).read_bytes()
        assert pathlib.Path(prefix + end).read_bytes() == theirs, end


@settings(max_examples=50, deadline=None)
@given(
    documents=st.lists(st.lists(st.lists(st.integers(-128, 127), max_size=9), max_size=4)),
    dtype=st.sampled_from([np.int8, np.int16, np.int32, np.int64]),
    data=st.data(),
)
def test_what_was_written_is_read(tmp_path_factory, documents, dtype, data):
    prefix = write(tmp_path_factory.mktemp("corpus") / "c", documents, dtype)
    corpus = indexed.IndexedCorpus(prefix)
    sequences = [sequence for document in documents for sequence in document]
    assert corpus.dtype == dtype
    assert len(corpus) == len(sequences)
    assert [corpus.read(i).tolist() for i in range(len(corpus))] == sequences
    assert corpus.document_indices.tolist() == np.cumsum([0, *map(len, documents)]).tolist()
    pieces = []
    for _ in range(data.draw(st.integers(0, 5)) if sequences else 0):
        i = data.draw(st.integers(0, len(sequences) - 1))
        offset = data.draw(st.integers(0, len(sequences[i])))
        pieces.append((i, offset, data.draw(st.integers(0, len(sequences[i]) - offset))))
    gathered = corpus.gather(*np.array(pieces, np.int64).reshape(-1, 3).T)
    expected = [token for i, offset, n in pieces for token in sequences[i][offset : offset + n]]
    assert gathered.tolist() == expected
    for i, offset, n in pieces:
        assert corpus.read(i, offset, n).tolist() == sequences[i][offset : offset + n]


def test_reading_past_a_sequence_stops_at_its_end(tmp_path):
    corpus = indexed.IndexedCorpus(write(tmp_path / "c", [[[1, 2, 3]], [[4, 5]]]))
    assert corpus.read(0, 1).tolist() == [2, 3]
    assert corpus.read(0, 2, 5).tolist() == [3]


def test_the_corpus_is_not_copied(tmp_path):
    corpus = indexed.IndexedCorpus(write(tmp_path / "c", [[[1, 2, 3]], [[4, 5]]]))
    assert np.shares_memory(corpus.read(1), corpus.tokens)
    assert not corpus.tokens.flags.owndata
    assert not corpus.tokens.flags.writeable


@pytest.mark.parametrize(("vocab_size", "dtype"), [(65_499, np.uint16), (65_500, np.int32)])
def test_tokens_are_stored_in_megatrons_type(vocab_size, dtype):
    assert indexed.token_dtype(vocab_size) is dtype


def test_nothing_has_its_name_before_all_is_written(tmp_path):
    with indexed.Writer(str(tmp_path / "c"), np.uint16) as writer:
        writer.add_document([[1, 2]])
        assert [path.name for path in tmp_path.iterdir()] == ["c.bin.partial"]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c.bin", "c.idx"]


def test_an_interrupted_writer_leaves_the_old_corpus(tmp_path):
    prefix = write(tmp_path / "c", [[[1, 2]]])
    with pytest.raises(KeyboardInterrupt), indexed.Writer(prefix, np.uint16) as writer:
        writer.add_document([[3]])
        raise KeyboardInterrupt
    assert indexed.IndexedCorpus(prefix).read(0).tolist() == [1, 2]
    assert len(list(tmp_path.iterdir())) == 2


def test_an_old_index_never_stands_beside_new_tokens(tmp_path, monkeypatch):
    """Killed between the two renames: there is no corpus, rather than a wrong one."""
    prefix = write(tmp_path / "c", [[[1, 2]]])
    replace = pathlib.Path.replace

    def killed(path, target):
        if path.name == "c.idx.partial":
            raise KeyboardInterrupt
        return replace(path, target)

    monkeypatch.setattr(pathlib.Path, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        write(prefix, [[[3, 4]]])
    with pytest.raises(errors.UserError, match=r"c\.idx: no such file"):
        indexed.IndexedCorpus(prefix)


@pytest.mark.parametrize(
    "tokens", [[70_000], [-1], np.array([65_536]), np.array([1.5]), np.array([-1], np.int8)]
)
def test_a_token_that_does_not_fit_is_refused(tmp_path, tokens):
    with pytest.raises(errors.UserError, match=r"c\.bin takes uint16 tokens, 0 to 65535"):
        write(tmp_path / "c", [[tokens]])
    assert list(tmp_path.iterdir()) == []


def replaced(at, new):
    return lambda b: b[:at] + new + b[at + len(new) :]


DAMAGE = {
    "empty": (".idx", lambda b: b"", r"c\.idx is not an index of Megatron's"),
    "another file": (".idx", lambda b: b"PK" + b[2:], r"c\.idx is not an index.*b'PKID"),
    "header cut": (".idx", lambda b: b[:30], r"c\.idx was cut: 30 bytes"),
    "version": (".idx", replaced(9, b"\2"), r"c\.idx has version 2; version 1 is known"),
    "dtype": (".idx", replaced(17, b"\7"), r"c\.idx has tokens of type code 7; known are 1 "),
    "dtype 0": (".idx", replaced(17, b"\0"), r"c\.idx has tokens of type code 0"),
    "index cut": (".idx", lambda b: b[:-1], r"c\.idx has 81 bytes where 2 sequences and 3 .* 82"),
    "index too long": (".idx", lambda b: b + b"123", r"c\.idx has 85 bytes where 2 sequences"),
    "count": (".idx", replaced(18, b"\xff" * 8), r"c\.idx has 82 bytes where \d{20} sequences"),
    "length": (".idx", replaced(34, b"\4"), r"sequence 1 begins at byte 6 where .* end at 8"),
    "pointer": (".idx", replaced(50, b"\7"), r"sequence 1 begins at byte 7 where .* end at 6"),
    "negative length": (".idx", replaced(38, b"\xff" * 4), r"sequence 1 has a negative length, -1"),
    "negative pointer": (".idx", replaced(42, b"\xff" * 8), r"sequence 0 begins at byte -1"),
    "documents": (".idx", replaced(74, b"\1"), r"documents do not cover its 2 sequences"),
    "falling documents": (".idx", replaced(66, b"\3"), r"documents do not cover its 2 sequences"),
    "tokens cut": (".bin", lambda b: b[:-1], r"c\.bin has 9 bytes and its index needs 10: .* cut"),
    "tokens empty": (".bin", lambda b: b"", r"c\.bin has 0 bytes and its index needs 10"),
    "other tokens": (".bin", lambda b: b + b"12", r"c\.bin has 12 bytes .* not of one corpus"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_named(tmp_path, damage):
    end, change, message = DAMAGE[damage]
    file = pathlib.Path(write(tmp_path / "c", [[[1, 2, 3]], [[4, 5]]]) + end)
    file.write_bytes(change(file.read_bytes()))
    with pytest.raises(errors.UserError, match=message):
        indexed.IndexedCorpus(str(tmp_path / "c"))


@settings(max_examples=200, deadline=None)
@given(
    at=st.integers(0, 81), byte=st.integers(0, 255), cut=st.one_of(st.none(), st.integers(0, 82))
)
def test_any_damage_is_an_error_or_harmless(tmp_path_factory, at, byte, cut):
    prefix = write(tmp_path_factory.mktemp("corpus") / "c", [[[1, 2, 3]], [[4, 5]]])
    damaged = bytearray(VECTOR)
    damaged[at] = byte
    pathlib.Path(prefix + ".idx").write_bytes(damaged[:cut])
    try:
        corpus = indexed.IndexedCorpus(prefix)
    except errors.UserError as error:
        assert "c.idx" in str(error) or "c.bin" in str(error)
    else:
        assert sum(len(corpus.read(i)) for i in range(len(corpus))) == corpus.n_tokens


def test_faults_far_into_an_index_are_found(tmp_path, monkeypatch):
    """The check runs over blocks: one fault behind the first block, in each kind."""
    monkeypatch.setattr(indexed, "CHECK_AT_ONCE", 3)
    file = pathlib.Path(write(tmp_path / "c", [[[7] * (i + 1)] for i in range(10)]) + ".idx")
    assert indexed.IndexedCorpus(str(tmp_path / "c")).n_tokens == 55
    whole = file.read_bytes()
    file.write_bytes(replaced(34 + 4 * 10 + 8 * 6, b"\xff")(whole))
    with pytest.raises(errors.UserError, match="sequence 6 begins at byte 255"):
        indexed.IndexedCorpus(str(tmp_path / "c"))
    file.write_bytes(replaced(34 + 4 * 7, b"\xfe\xff\xff\xff")(whole))
    with pytest.raises(errors.UserError, match="sequence 7 has a negative length, -2"):
        indexed.IndexedCorpus(str(tmp_path / "c"))


@pytest.mark.parametrize("end", [".idx", ".bin"])
def test_a_missing_file_is_named(tmp_path, end):
    prefix = write(tmp_path / "c", [[[1]]])
    pathlib.Path(prefix + end).unlink()
    with pytest.raises(errors.UserError, match=rf"c\{end}: no such file \(see "):
        indexed.IndexedCorpus(prefix)


@pytest.mark.parametrize("end", [".idx", ".bin"])
def test_a_prefix_given_with_its_extension_gets_a_hint(tmp_path, end):
    prefix = write(tmp_path / "c", [[[1]]])
    with pytest.raises(errors.UserError, match=r"takes the prefix of both files: '.*/c' in place"):
        indexed.IndexedCorpus(prefix + end)
