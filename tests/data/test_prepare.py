"""From text to a corpus: Megatron's bytes, any input, bad lines, and interruptions."""

import gzip
import json
import os
import pathlib
import signal
import subprocess
import sys
import time
import unicodedata

import numpy as np
import pyarrow
import pytest
import tokenizers
from backports import zstd
from hypothesis import given
from hypothesis import strategies as st
from pyarrow import parquet

from gpt3jax import errors
from gpt3jax.data import (
    documents,
    indexed,
    prepare,
    tokenizer,
    tokenizer_sources,
)

import corpus

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
GPT2 = (str(GOLDEN / "gpt2" / "vocab.json"), str(GOLDEN / "gpt2" / "merges.txt"))
TEXTS = [
    "The cat sat on the mat.\n\nIt isn't flat; 12 cats  are.\t\r\n",
    "naïve café — Ωμέγα, 日本語, 🙂🙂 \u200b\x00\x7f",
    "",
    " \n ",
    "two<|endoftext|>documents",
    "x" * 3000,
]


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    return corpus.train_tokenizer(tmp_path_factory.mktemp("bpe"), TEXTS)


@pytest.fixture(scope="module")
def bpe(files):
    return tokenizer_sources.from_files(*files)


def options(files, folder, *inputs, **fields):
    source = tokenizer_sources.Source(vocab_file=files[0], merge_file=files[1])
    return prepare.Options(
        input=tuple(map(str, inputs)),
        output_prefix=str(folder / "out"),
        **{"source": source, "workers": 2, **fields},
    )


def read(prefix):
    """Return the sequences of a corpus, and how many each document has."""
    corpus = indexed.IndexedCorpus(str(prefix))
    sequences = [corpus.read(i).tolist() for i in range(len(corpus))]
    return sequences, np.diff(corpus.document_indices).tolist()


def lines_of(texts):
    return "".join(json.dumps({"id": 7, "text": text}) + "\n" for text in texts).encode()


@pytest.mark.parametrize("workers", [1, 4])
@pytest.mark.parametrize("name", ["corpus_text_document", "corpus_no_eod_text_document"])
def test_bytes_are_megatrons(tmp_path, monkeypatch, name, workers):
    monkeypatch.setattr(documents, "CHUNK_BYTES", 20_000)  # else the corpus is one chunk
    golden = GOLDEN / "prepare"
    made = options(
        GPT2, tmp_path, golden / "corpus.jsonl", workers=workers, append_eod="no_eod" not in name
    )
    report = prepare.prepare(made)
    assert (report.n_documents, report.n_empty, report.n_bad) == (136, 2, 0)
    for suffix in (".bin", ".idx"):
        ours = (tmp_path / f"out_text_document{suffix}").read_bytes()
        assert ours == (golden / (name + suffix)).read_bytes(), suffix


def test_tiktoken_cuts_every_character_as_gpt2_does():
    gpt2 = tokenizer_sources.from_files(*GPT2)
    assert gpt2.uses_tiktoken
    unassigned = {"Cn", "Co", "Cs"}
    assigned = [c for c in map(chr, range(0x110000)) if unicodedata.category(c) not in unassigned]
    assert len(assigned) > 140_000
    for low in range(0, len(assigned), 4096):
        text = "".join(f"a{c}b {c}1{c} {c} {c}{c}\n" for c in assigned[low : low + 4096])
        assert gpt2.encode_batch([text])[0].tolist() == gpt2.encode(text), assigned[low]


def test_every_format_gives_the_same_documents(tmp_path, files, bpe):
    texts = [text for text in TEXTS if text]
    data = lines_of(texts)
    (tmp_path / "a.jsonl").write_bytes(data.rstrip(b"\n"))  # the last line without its end
    (tmp_path / "a.json").write_bytes(data.replace(b"\n", b"\r\n"))
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(data[:90]) + gzip.compress(data[90:]))
    (tmp_path / "a.jsonl.zst").write_bytes(zstd.compress(data[:90]) + zstd.compress(data[90:]))
    parquet.write_table(
        pyarrow.table({"text": texts, "n": [1] * len(texts)}), tmp_path / "a.parquet"
    )
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for i, text in enumerate(texts):
        name = f"{i}.txt.gz" if i % 2 else f"sub/{i}.txt"
        content = text.encode()
        path = tmp_path / "folder" / name
        path.write_bytes(gzip.compress(content) if i % 2 else content)
    (tmp_path / "folder" / "README.md").write_text("of no known kind: passed over")
    expected = [bpe.encode(text) for text in texts]
    for name in ("a.jsonl", "a.json", "a.jsonl.gz", "a.jsonl.zst", "a.parquet", "a.j*l"):
        prepare.prepare(options(files, tmp_path, tmp_path / name))
        assert read(tmp_path / "out_text_document") == (expected, [1] * len(texts)), name
    prepare.prepare(options(files, tmp_path, tmp_path / "folder"))
    in_order = expected[1::2] + expected[0::2]  # 1.txt.gz, 3.txt.gz, sub/0.txt, ...
    assert read(tmp_path / "out_text_document")[0] == in_order


def test_files_follow_each_other_in_the_order_given(tmp_path, files, bpe):
    for name, text in (("a", "one"), ("b", "two")):
        (tmp_path / f"{name}.txt").write_text(text)
    prepare.prepare(options(files, tmp_path, tmp_path / "b.txt", tmp_path / "a.txt"))
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode("two"), bpe.encode("one")]


@pytest.mark.parametrize("workers", [1, 3])
def test_order_is_kept_whatever_the_workers(tmp_path, monkeypatch, files, bpe, workers):
    """The first chunk is the slowest to encode."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 500)
    encode = prepare.encode

    def slow(chunk, *rest):
        time.sleep(0.1 if chunk.first == 1 else 0)
        return encode(chunk, *rest)

    monkeypatch.setattr(prepare, "encode", slow)
    texts = [f"document {i} " + "blah " * (i % 7) for i in range(300)]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    made = options(files, tmp_path, tmp_path / "a.jsonl", workers=workers, append_eod=True)
    prepare.prepare(made)
    expected = [[*bpe.encode(text), bpe.eod_id] for text in texts]
    assert read(tmp_path / "out_text_document")[0] == expected


def test_a_list_of_texts_is_a_document_of_sequences(tmp_path, files, bpe):
    (tmp_path / "a.jsonl").write_text(
        json.dumps({"text": ["One. ", "", "Two."]}) + '\n{"text": []}'
    )
    prepare.prepare(options(files, tmp_path, tmp_path / "a.jsonl", append_eod=True))
    sequences, documents_ = read(tmp_path / "out_text_document")
    assert sequences == [bpe.encode("One. "), [*bpe.encode("Two."), bpe.eod_id]]
    assert documents_ == [2, 0]


def test_a_text_file_of_any_size_is_one_document(tmp_path, monkeypatch, files, bpe):
    """It is read in pieces that are smaller than the largest document."""
    monkeypatch.setattr(documents, "CHUNK_BYTES", 1000)
    text = "".join(TEXTS[0] + f"{i} 🙂é word<|endoftext|> " for i in range(400))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "b.txt").write_text("another")
    pieces = list(documents.read(tmp_path / "a.txt", "text", 4000, tokenizer.last_cut))
    assert len(pieces) > 20 and max(len(p.records[0]) for p in pieces) < 4000
    made = options(files, tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", append_eod=True)
    prepare.prepare(made)
    expected = [[*bpe.encode(t), bpe.eod_id] for t in (text, "another")]
    assert read(tmp_path / "out_text_document") == (expected, [1, 1])


@given(st.text(alphabet="ab'sl1. \n\t\x1c<|>é\u2003", max_size=60))
def test_a_text_cut_in_two_has_the_same_tokens(bpe, text):
    cut = tokenizer.last_cut(text)
    assert bpe.encode(text[:cut]) + bpe.encode(text[cut:]) == bpe.encode(text)


def test_long_texts_are_cut_at_their_last_blank():
    assert tokenizer.last_cut("one two\nthree" + "x" * 10_000) == 8
    assert tokenizer.last_cut("one two  \n" + "x" * 10_000) == 3
    assert tokenizer.last_cut("x" * 10_000 + "  ") == 0


BAD = {
    b"{": "not JSON: an object of several lines; the file must have one object a line",
    b"{5}": "not JSON: Expecting property name",
    b'[{"text": "a"}]': "a JSON array; the file must have one object a line, which jq -c '.[]'",
    b"[": "a JSON array",
    b"5": "no key 'text'",
    b'{"a": 1, "b": 2}': "no key 'text'; its keys are a, b",
    b'{"text": 5}': "'text' is not a string",
    b'{"text": ["a", null]}': "'text' is not a string",
    b'{"text": "\xff"}': "not UTF-8",
    b'{"text": "\\ud800"}': "half a surrogate pair",
    b"": "a blank line",
    b'{"text": "' + b"x" * (1 << 20) + b'"}': "larger than --max-document-mb=1",
    b"[" + b'{"text": "x"},' * (1 << 17): "a JSON array",
}


@pytest.mark.parametrize("line", BAD, ids=range(len(BAD)))
def test_a_bad_line_is_named_or_left_out(tmp_path, files, bpe, line):
    good = lines_of(["one", "two"]).splitlines()
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\n".join([good[0], line, good[1], line]) + b"\n")
    with pytest.raises(errors.UserError) as error:
        prepare.prepare(options(files, tmp_path, path, max_document_mb=1))
    assert str(error.value).startswith(f"{path}:2: ") and BAD[line] in str(error.value)
    assert "--on-bad-line skip" in str(error.value)
    assert not list(tmp_path.glob("out*"))
    made = options(files, tmp_path, path, max_document_mb=1, on_bad_line="skip")
    report = prepare.prepare(made)
    assert report.n_bad == 2 and report.bad[1].startswith(f"{path}:4: ")
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode("one"), bpe.encode("two")]


def test_a_text_file_that_is_not_utf8_is_a_bad_document(tmp_path, files, bpe):
    (tmp_path / "a.txt").write_bytes(b"word " * 500_000 + b"\xff")  # found in the third MiB
    (tmp_path / "b.txt").write_text("two")
    made = options(files, tmp_path, tmp_path / "a.txt", tmp_path / "b.txt", on_bad_line="skip")
    assert prepare.prepare(made).bad == [f"{tmp_path}/a.txt:1: not UTF-8: invalid start byte"]
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode("two")]


@pytest.mark.parametrize("policy, counts", [("keep", [1, 0, 1]), ("skip", [1, 1]), ("error", None)])
def test_an_empty_document_is_kept_left_out_or_fatal(tmp_path, files, policy, counts):
    path = tmp_path / "a.jsonl"
    path.write_bytes(lines_of(["one", "", "two"]))
    made = options(files, tmp_path, path, on_empty_document=policy, append_eod=True)
    if counts is None:
        with pytest.raises(errors.UserError, match=r"a.jsonl:2: an empty document"):
            prepare.prepare(made)
        return
    assert prepare.prepare(made).n_empty == 1
    assert read(tmp_path / "out_text_document")[1] == counts


def test_a_mark_of_utf8_is_no_text(tmp_path, files, bpe):
    """Windows programs write it before the text; behind that it is a character like others."""
    mark = "\ufeff".encode()
    (tmp_path / "a.jsonl").write_bytes(mark + lines_of(["one", "\ufefftwo"]))
    (tmp_path / "b.txt").write_bytes(mark + "three\ufeff".encode())
    prepare.prepare(options(files, tmp_path, tmp_path / "a.jsonl", tmp_path / "b.txt"))
    expected = [bpe.encode(text) for text in ("one", "\ufefftwo", "three\ufeff")]
    assert read(tmp_path / "out_text_document")[0] == expected


def test_utf16_is_called_by_its_name(tmp_path, files):
    (tmp_path / "a.txt").write_text("text", encoding="utf-16")
    with pytest.raises(errors.UserError, match=r"a\.txt:1: not UTF-8: UTF-16"):
        prepare.prepare(options(files, tmp_path, tmp_path / "a.txt"))


def test_characters_that_only_look_like_line_ends_stay_in_their_document(tmp_path, files, bpe):
    text = "a\u2028b\x0cc\x85d\x1ee\rf\r\ng"
    lines = json.dumps({"text": text}, ensure_ascii=False) + "\n" + json.dumps({"text": "two"})
    (tmp_path / "a.jsonl").write_bytes(lines.encode())
    (tmp_path / "b.txt").write_bytes(text.encode())
    prepare.prepare(options(files, tmp_path, tmp_path / "a.jsonl", tmp_path / "b.txt"))
    expected = [bpe.encode(text), bpe.encode("two"), bpe.encode(text)]
    assert read(tmp_path / "out_text_document")[0] == expected


def test_hidden_files_of_a_folder_are_left_out(tmp_path, files, bpe):
    for name in ("a.txt", ".b.txt", ".ipynb_checkpoints/a.txt", "sub/.git/c.txt", "a.txt~"):
        path = tmp_path / ".data" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(name)
    prepare.prepare(options(files, tmp_path, tmp_path / ".data"))
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode("a.txt")]
    prepare.prepare(options(files, tmp_path, tmp_path / ".data" / ".b.txt"))  # asked for by name
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode(".b.txt")]


def test_the_report_names_what_is_left_out_of_a_folder(tmp_path, files, bpe, monkeypatch, capsys):
    """A kind is known by its name in either case."""
    for name in ("B.TXT", "C.txt.GZ", "d.csv", ".hidden", "sub/e.jsonl.bz2"):
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        content = name.encode()
        (tmp_path / "in" / name).write_bytes(gzip.compress(content) if "GZ" in name else content)
    words = ["prepare", "--input", str(tmp_path / "in"), "--output-prefix", str(tmp_path / "out")]
    words += ["--vocab-file", files[0], "--merge-file", files[1]]
    monkeypatch.setattr(sys, "argv", words)
    assert prepare.main() == 0
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode("B.TXT"), bpe.encode("C.txt.GZ")]
    report = capsys.readouterr().out
    others = f"2 files of other kinds in folders were left out, first {tmp_path}/in/d.csv"
    assert others in report
    assert "WARNING" not in report


def test_a_tokenizer_that_drops_characters_is_reported(tmp_path, files, bpe):
    words = {"a": 0, "b": 1, "<|endoftext|>": 2}
    (tmp_path / "a.txt").write_text("axb")
    for model, ids, drops in (
        (tokenizers.models.BPE(words, []), [0, 1], True),
        (tokenizers.models.BPE(words, [], unk_token="<|endoftext|>"), [0, 2, 1], False),
        (bpe.backend.model, bpe.encode("axb"), False),
    ):
        rust = tokenizers.Tokenizer(model)
        rust.save(str(tmp_path / "tokenizer.json"))
        source = tokenizer_sources.Source(tokenizer=str(tmp_path / "tokenizer.json"))
        made = options(files, tmp_path, tmp_path / "a.txt", source=source)
        report = prepare.prepare(made)
        assert ("WARNING: the tokenizer" in "".join(prepare.report_lines(report, made))) == drops
        assert read(tmp_path / "out_text_document")[0] == [ids]


def test_a_zstandard_window_of_any_size_is_read(tmp_path, files, bpe):
    """The window is the whole frame's, as `zstd --long=31` asks for; the default limit is 27."""
    parameters = zstd.CompressionParameter
    long = {parameters.window_log: 28, parameters.compression_level: 1}
    content = zstd.ZstdCompressor(options=long)  # streamed, so that the size is not known
    data = content.compress(lines_of(["one"])) + content.flush()
    (tmp_path / "a.jsonl.zst").write_bytes(data)
    prepare.prepare(options(files, tmp_path, tmp_path / "a.jsonl.zst"))
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode("one")]


@pytest.mark.parametrize(
    "column",
    [
        pyarrow.array([b"one", "Ωμ".encode()]),
        pyarrow.array([b"one", "Ωμ".encode()], pyarrow.large_binary()),
        pyarrow.array(["one", "Ωμ"], pyarrow.large_string()),
        pyarrow.array(["one", "Ωμ"]).dictionary_encode(),
        pyarrow.array([[b"one"], ["Ωμ".encode()]]),
    ],
    ids=lambda column: str(column.type).split("<")[0],
)
def test_a_column_of_any_kind_of_text_is_read_as_text(tmp_path, files, bpe, column):
    parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
    prepare.prepare(options(files, tmp_path, tmp_path / "a.parquet"))
    assert read(tmp_path / "out_text_document")[0] == [bpe.encode("one"), bpe.encode("Ωμ")]


def test_a_column_of_bytes_is_no_column_of_json(tmp_path, files, bpe):
    rows = [b'{"text": "one"}', b"\xff", b"two"]
    unchecked = pyarrow.array(rows).buffers()  # Parquet's texts are checked by nobody
    for column in (
        pyarrow.array(rows),
        pyarrow.Array.from_buffers(pyarrow.string(), len(rows), unchecked),
    ):
        parquet.write_table(pyarrow.table({"text": column}), tmp_path / "a.parquet")
        made = options(files, tmp_path, tmp_path / "a.parquet", on_bad_line="skip")
        assert prepare.prepare(made).bad == [
            f"{tmp_path}/a.parquet:2: not UTF-8: invalid start byte at byte 0"
        ]
        expected = [bpe.encode('{"text": "one"}'), bpe.encode("two")]
        assert read(tmp_path / "out_text_document")[0] == expected


def test_memory_does_not_grow_with_a_row_group(tmp_path):
    """48 MiB of text in one row group, read from Arrow's pool of a few MiB."""
    text = np.random.default_rng(0).integers(97, 123, 4096, np.uint8).tobytes().decode()
    table = pyarrow.table({"text": [f"{i}{text}" for i in range(12_000)]})
    path = tmp_path / "a.parquet"
    parquet.write_table(table, path, use_dictionary=False, compression="none")
    assert parquet.ParquetFile(path).num_row_groups == 1
    counts = subprocess.run(
        [sys.executable, "-c", PEAK, str(path)], capture_output=True, text=True, check=True
    ).stdout
    n_rows, n_chunks, peak = map(int, counts.split())
    assert n_rows == 12_000 and n_chunks > 40
    assert peak < 24 << 20, peak


# The largest sum of Arrow's buffers, in a process of its own.
PEAK = """
import pathlib, sys
import pyarrow
from gpt3jax.data import documents
counts = [len(c.records) for c in documents.read(pathlib.Path(sys.argv[1]), "text", 1 << 28, None)]
print(sum(counts), len(counts), pyarrow.default_memory_pool().max_memory())
"""


def test_rows_without_text_are_bad(tmp_path, files):
    parquet.write_table(pyarrow.table({"text": ["one", None]}), tmp_path / "a.parquet")
    with pytest.raises(errors.UserError, match=r"a.parquet:2: 'text' is not a string"):
        prepare.prepare(options(files, tmp_path, tmp_path / "a.parquet"))
    with pytest.raises(errors.UserError, match=r"no column 'body'.*it has text"):
        prepare.prepare(options(files, tmp_path, tmp_path / "a.parquet", json_key="body"))


@pytest.mark.parametrize(
    "suffix, how",
    [(s, h) for s in (".jsonl.gz", ".jsonl.zst", ".parquet") for h in ("cut", "other")]
    + [(".jsonl.gz", "flip")],  # the others have no checksum unless the writer asks for one
)
def test_a_damaged_file_is_named(tmp_path, files, suffix, how):
    texts = [f"{i} {i * i}" for i in range(3000)]
    path = tmp_path / f"a{suffix}"
    if suffix == ".parquet":
        parquet.write_table(pyarrow.table({"text": texts}), path)
    else:
        compress = gzip.compress if suffix.endswith("gz") else zstd.compress
        path.write_bytes(compress(lines_of(texts)))
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x55
    content = {"flip": content, "cut": path.read_bytes()[:-9], "other": b"plain text"}[how]
    path.write_bytes(content)
    with pytest.raises(errors.UserError, match=r"a\.\w+(\.\w+)?(:\d+)?: "):
        prepare.prepare(options(files, tmp_path, path))
    assert not list(tmp_path.glob("out*"))


@pytest.mark.parametrize(
    "word, message",
    [("nothing*.jsonl", "no file there"), ("a.csv", "unknown kind"), ("empty", "no file there")],
)
def test_inputs_that_lead_nowhere_are_named(tmp_path, files, word, message):
    (tmp_path / "a.csv").write_text("1,2")
    (tmp_path / "empty").mkdir()
    with pytest.raises(errors.UserError, match=message) as error:
        prepare.prepare(options(files, tmp_path, tmp_path / word))
    assert word in str(error.value)


def test_input_without_any_text_makes_no_corpus(tmp_path, files):
    (tmp_path / "a.jsonl").write_bytes(lines_of(["", ""]))
    with pytest.raises(errors.UserError, match="there is no text"):
        prepare.prepare(options(files, tmp_path, tmp_path / "a.jsonl"))
    (tmp_path / "a.jsonl").write_text('[\n{"text": "one"},\n]')
    with pytest.raises(errors.UserError, match=r"no text.*: 3 bad lines, .*:1: a JSON array"):
        prepare.prepare(options(files, tmp_path, tmp_path / "a.jsonl", on_bad_line="skip"))
    assert not list(tmp_path.glob("out*"))


def test_a_tokenizer_json_serves_too(tmp_path, files, bpe):
    """In a file, in a folder, or as GPT-2's two files in a folder."""
    folder = tmp_path / "tokenizer"
    folder.mkdir()
    bpe.backend.save(str(folder / "tokenizer.json"))
    (tmp_path / "a.txt").write_text(TEXTS[0] * 3)
    for name in (folder / "tokenizer.json", folder, pathlib.Path(files[0]).parent):
        source = tokenizer_sources.Source(tokenizer=str(name))
        prepare.prepare(options(files, tmp_path, tmp_path / "a.txt", source=source))
        assert read(tmp_path / "out_text_document")[0] == [bpe.encode(TEXTS[0] * 3)]
    with pytest.raises(errors.UserError, match=r"no token '</s>'.*--eod-token"):
        tokenizer_sources.Source(tokenizer=str(folder), eod_token="</s>").open()
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(errors.UserError, match=r"give a tokenizer\.json"):
        tokenizer_sources.Source(tokenizer=str(folder)).open()
    for wrong in (
        {},
        {"vocab_file": "v"},
        {"vocab_file": "v", "merge_file": "m", "tokenizer": "t"},
    ):
        with pytest.raises(errors.UserError, match="--vocab-file and --merge-file together, or"):
            tokenizer_sources.Source(**wrong).open()


def test_a_killed_run_leaves_no_corpus_and_the_next_is_whole(tmp_path, files):
    """As a user would run it; the input is large enough to be killed in the middle of it."""
    texts = [f"document {i} " + "some words of text " * 40 for i in range(3000)]
    (tmp_path / "a.jsonl").write_bytes(lines_of(texts))
    command = [sys.executable, "-m", "gpt3jax.data.prepare", "--input", "a.jsonl"]
    command += ["--output-prefix", "out", "--vocab-file", files[0], "--merge-file", files[1]]
    process = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.DEVNULL)
    partial = tmp_path / "out_text_document.bin.partial"
    while process.poll() is None and not (partial.exists() and partial.stat().st_size):
        time.sleep(0.001)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert not (tmp_path / "out_text_document.idx").exists()
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("out_text_document.bin and .idx: 3,000 documents")
    assert "tokens/s" in done.stderr
    assert sorted(os.listdir(tmp_path)) == [
        "a.jsonl", "out_text_document.bin", "out_text_document.idx",
    ]  # fmt: skip


def test_errors_are_one_line_and_a_status(tmp_path, monkeypatch, capsys, files):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.jsonl").write_text("{\n")
    words = ["prepare", "--input", "a.jsonl", "--output-prefix", "out"]
    folder = str(pathlib.Path(files[0]).parent)
    monkeypatch.setattr(sys, "argv", [*words, "--tokenizer", folder])
    assert prepare.main() == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "leave out such lines with --on-bad-line skip (see docs/" in message
    assert "a.jsonl:1: not JSON" in message


@pytest.mark.skipif(os.geteuid() != 0, reason="only root mounts a small disk")
def test_a_full_disk_is_an_error_of_one_line(tmp_path, files):
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "prepare", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("only root mounts a small disk")
    try:
        (tmp_path / "a.jsonl").write_bytes(lines_of(["1 2 3 4 5 6 7 8 9 " * 200] * 400))
        made = options(files, disk, tmp_path / "a.jsonl")
        with pytest.raises(errors.UserError, match="No space left on device"):
            prepare.prepare(made)
        assert not list(disk.iterdir())
    finally:
        subprocess.run(["umount", "--lazy", str(disk)], check=True)
