"""The page of runs: what it says of each part, and that it says something whatever is there."""

import html.parser
import json
import re
import sys

import hypothesis
import hypothesis.strategies as st
import pytest

from gpt3jax import errors
from gpt3jax.report import __main__ as command
from gpt3jax.report import html_page, run_folder

import made_up_run
from made_up_run import NOW


@pytest.fixture
def folder(tmp_path):
    return made_up_run.write(tmp_path / "run")


class Words(html.parser.HTMLParser):
    """Collects texts, the classes of elements, and elements that do not close in order."""

    def __init__(self):
        super().__init__()
        self.open, self.texts, self.tags, self.wrong = [], [], [], []

    def handle_starttag(self, tag, attributes):
        """Note what opens."""
        self.tags.append(tag)
        if tag not in ("meta", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        """Note what closes out of order."""
        if self.open.pop() != tag:
            self.wrong.append(tag)

    def handle_data(self, data):
        """Keep a text."""
        if self.open and self.open[-1] not in ("script", "style"):
            self.texts.append(data)


def page_of(*folders):
    """Return a page and its words, joined by blanks."""
    page = html_page.render(run_folder.read_all([str(folder) for folder in folders]), NOW)
    parsed = Words()
    parsed.feed(page)
    assert not parsed.open and not parsed.wrong
    assert not re.search(r"https?:|src=|href=|url\(", page)
    return page, " ".join(" ".join(parsed.texts).split())


def test_the_page_says_what_happened(folder):
    page, words = page_of(folder)
    for text in (
        "80 of 100", "80%, stopped on request",
        "1 2023-11-14 22:13:20 0m32s 0 to 45 5 data 4 4 x cpu 0.12.0 killed or failed",
        "2 2023-11-14 22:15:32 0m30s 1m40s 40 to 80 tensor 4 4 x cpu 0.12.0 stopped",
        "Resumed after step 40 then now mesh data 4 tensor 4",
        'data.skip_samples "" 8:16',
        "2 entries were set aside",
        "Difference of the loss in 2 steps logged both times: none",
        "30 not finite skip NaN left out 464:480",
        "steps: 64.0%, 0m40s", "lost steps: 4.0%, 0m02s", "compile: 8.0%, 0m05s",
        "restart layout change skipped steps not finite spike",
    ):  # fmt: skip
        assert text in words, words
    assert page.count("<figure>") == 7 and "no value yet" not in page


def test_evaluations_after_the_last_logged_step_are_on_the_charts(folder):
    file = folder / "logs" / "metrics.jsonl"
    lines = file.read_text().splitlines(keepends=True)
    file.write_text("".join(lines[:1] + lines[-2:]))  # step 2, evaluations after 40 and 80
    page, _ = page_of(folder)
    assert re.search(r'data-axis="step" data-low="0" data-high="80"', page)
    (dots,) = re.findall(r'x0".*?<path d="([^"]*)" class="dot c1">', page)
    assert dots.startswith("M3000 ") and "M6000 " in dots


def test_steps_that_differ_the_second_time_are_told(folder):
    made_up_run.write_lines(
        folder / "logs" / "metrics.dropped.jsonl", [made_up_run.entry(42) | {"loss": 4.0}]
    )
    difference = made_up_run.loss(42) - 4.0
    assert f"in 1 steps logged both times: {difference:.3g} at most" in page_of(folder)[1]


def test_runs_stand_side_by_side_with_what_differs(folder, tmp_path):
    other = made_up_run.write(tmp_path / "other")
    file = other / "logs" / "config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(config | {"optimizer.peak_lr": 0.5, "data.new_field": [1, 2]}))
    _, words = page_of(folder, other)
    assert "run other steps 80 of 100 (80%, stopped on request) 80 of 100" in words
    differences = words.partition("Differences of config")[2]
    assert differences == " run other optimizer.peak_lr 0.001 0.5 data.new_field 1 2"
    _, words = page_of(folder, made_up_run.write(tmp_path / "third"))
    assert words.endswith("Differences of config no field differs")


def test_labels_are_short_where_that_is_clear(folder, tmp_path):
    runs = run_folder.read_all([str(folder), str(made_up_run.write(tmp_path / "b") / "logs")])
    assert html_page.labels(runs) == ["run", "b"]
    same = made_up_run.write(tmp_path / "sub" / "run")
    names = [str(folder), str(same)]
    assert html_page.labels(run_folder.read_all(names)) == names


def test_text_of_files_is_never_part_of_the_page(tmp_path):
    evil = "<script>alert(1)</script>"
    folder = made_up_run.write(tmp_path / "<script>alert(1)<" / "script>")
    config = folder / "logs" / "config.json"
    config.write_text(config.read_text().replace("tensor 4", evil).replace("dense", evil))
    fault = folder / "logs" / "faults" / "step-30.json"
    fault.write_text(fault.read_text().replace("464:480", evil).replace("skip", evil))
    goodput = folder / "logs" / "goodput.json"
    goodput.write_text(goodput.read_text().replace("4 x cpu", evil))
    page, words = page_of(folder)
    assert "<script>alert" not in page and words.count(evil) >= 4
    assert page.count("<script") == 2  # the values under the cursor, and what shows them


def test_a_run_that_has_logged_nothing_has_a_page(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "metrics.jsonl").touch()
    _, words = page_of(tmp_path / "run")
    assert "No step is logged yet." in words and "steps 0" in words
    folder = made_up_run.write(tmp_path / "second")
    (folder / "logs" / "metrics.jsonl").unlink()
    assert "No step is logged yet." in page_of(folder)[1]
    assert "run second" in page_of(tmp_path / "run", folder)[1]


@hypothesis.settings(
    max_examples=40, deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@hypothesis.given(st.data())
def test_any_beginning_of_a_file_gives_a_page_or_an_error(tmp_path, data):
    if not (tmp_path / "run").exists():
        made_up_run.write(tmp_path / "run")
    whole = "".join(json.dumps(made_up_run.entry(step)) + "\n" for step in range(1, 9)).encode()
    end = data.draw(st.integers(0, len(whole)))
    change = data.draw(
        st.sampled_from([b"", b"NaN", b"-1e999", b"null", b'"', b"[", b"\xff", b"9" * 400])
    )
    at = data.draw(st.integers(0, end))
    (tmp_path / "run" / "logs" / "metrics.jsonl").write_bytes(whole[:at] + change + whole[at:end])
    try:
        page_of(tmp_path / "run")
    except errors.UserError as error:
        assert "has no entry" in str(error)


extremes = st.sampled_from(
    [0, -1, 5e-324, 1e-5, 0.1, 1e15, 2**53, 1e308, -1e308, 10**400, "NaN", "Infinity", None, True,
     "x", [], {}]
)  # fmt: skip
fields = st.sampled_from([*made_up_run.entry(1), "validation_loss", "test_loss"])


@hypothesis.settings(
    max_examples=40, deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)  # fmt: skip
@hypothesis.given(st.lists(st.dictionaries(fields, extremes, max_size=6), max_size=8))
def test_any_values_give_a_page_or_an_error(tmp_path, changes):
    if not (tmp_path / "run").exists():
        made_up_run.write(tmp_path / "run")
    entries = [made_up_run.entry(step) | change for step, change in enumerate(changes, 1)]
    made_up_run.write_lines(tmp_path / "run" / "logs" / "metrics.jsonl", entries)
    try:
        page_of(tmp_path / "run")
    except errors.UserError as error:
        assert "has no entry" in str(error)


def call(monkeypatch, *args):
    monkeypatch.setattr(sys, "argv", ["report", *map(str, args)])
    monkeypatch.setenv("COLUMNS", "200")
    return command.main()


def test_the_command_writes_a_page_or_prints_a_summary(folder, tmp_path, monkeypatch, capsys):
    page = tmp_path / "report.html"
    assert call(monkeypatch, folder, "--html", page) == errors.DONE
    assert page.read_text().startswith("<!doctype html>")
    assert capsys.readouterr().out == f"wrote {page}\n"
    assert call(monkeypatch, folder) == errors.DONE
    out = capsys.readouterr().out
    assert "80 of 100 (80%, stopped on request)" in out and "goodput" in out


def test_the_command_refuses_in_one_line(folder, tmp_path, monkeypatch, capsys):
    for args, words in (
        ([], "no RUN is given"),
        ([tmp_path / "none"], "is no folder"),
        ([folder, folder], "is the same folder as"),
        ([folder, "--html", tmp_path / "none" / "page.html"], "cannot be written"),
        (["gs://bucket/run"], "the address of a store"),
    ):
        assert call(monkeypatch, *args) == errors.REFUSED
        told = capsys.readouterr()
        assert words in told.err and told.err.count("\n") == 1 and not told.out
