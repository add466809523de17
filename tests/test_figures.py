"""The figures of docs/figures: drawn again from their data, and as they are in the repository."""

import importlib
import re
import sys
from xml.etree import ElementTree

import pytest

import corpus

FIGURES = corpus.REPOSITORY / "docs" / "figures"
NAMES = ("one_loss", "megatron_curve", "plan_175b", "ramp", "killed", "float8")
LARGEST = 60_000  # bytes: a page with all of them opens at once
PAGES = ("#ffffff", "#0d1117")  # a white page, and GitHub's dark one


@pytest.fixture
def load(monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.syspath_prepend(FIGURES)
    yield importlib.import_module
    for name in (*NAMES, "measured", "style"):
        sys.modules.pop(name, None)


def svg_of(folder, name):
    """Return the text of an SVG, checked to be one and to be small."""
    text = (folder / f"{name}.svg").read_text()
    assert ElementTree.fromstring(text).tag.endswith("svg")
    assert len(text) < LARGEST
    return text


def test_each_figure_has_a_script_data_and_a_picture():
    scripts = {path.stem for path in FIGURES.glob("*.py")} - {"measured", "style"}
    pictures = {path.stem for path in FIGURES.glob("*.svg")}
    data = {path.stem for path in (FIGURES / "data").glob("*.json")}
    makefile = (corpus.REPOSITORY / "Makefile").read_text()
    (made,) = re.findall(r"for figure in (.*);", makefile)
    assert scripts == pictures == data == set(NAMES) == set(made.split())


@pytest.mark.parametrize("name", NAMES)
def test_a_figure_is_drawn_from_its_data(load, name, tmp_path):
    """The picture here is of these data: their commit, and every word, stand in both."""
    data = load("measured").read(name)
    load(name).draw(data, tmp_path)
    drawn, committed = svg_of(tmp_path, name), svg_of(FIGURES, name)
    told = load("style").told(data["source"])
    for svg in (drawn, committed):
        assert told in "".join(re.findall(r"<dc:source>\s*(.*?)\s*</dc:source>", svg))
        assert re.search(r"<text[^>]*>commit [0-9a-f]{10}", svg)
        assert words(svg) == words(drawn)


def words(svg):
    return re.findall(r"<text[^>]*>(.*?)</text>", svg)


@pytest.mark.parametrize("name", NAMES)
def test_no_path_of_the_machine_that_measured_is_told(name):
    for file in (FIGURES / f"{name}.svg", FIGURES / "data" / f"{name}.json"):
        assert not re.search(r"(?<![\w.:/])/(?!/)[\w.]+/[\w.]+", file.read_text()), file


def test_every_color_is_legible_on_a_white_page_and_on_a_dark_one(load):
    style = load("style")
    for color in (style.GREY, *style.COLORS):
        for page in PAGES:
            assert contrast(color, page) >= 4, f"{color} on {page}"


def contrast(color, page):
    """Return the contrast of two colors, as WCAG 2 defines it."""
    darker, brighter = sorted((luminance(color), luminance(page)))
    return (brighter + 0.05) / (darker + 0.05)


def luminance(color):
    shares = [int(color[i : i + 2], 16) / 255 for i in (1, 3, 5)]
    linear = [s / 12.92 if s <= 0.04045 else ((s + 0.055) / 1.055) ** 2.4 for s in shares]
    return sum(weight * x for weight, x in zip((0.2126, 0.7152, 0.0722), linear, strict=True))


def test_one_loss_has_every_mesh_and_each_follows_one_device(load):
    figure = load("one_loss")
    data = load("measured").read("one_loss")
    assert set(data["meshes"]) == {figure.name_of(sizes) for sizes in figure.every_mesh()}
    assert len(data["meshes"]) == 35
    for losses in data["meshes"].values():
        assert losses == pytest.approx(data["one_device"], rel=1e-5)


def test_our_losses_are_those_that_megatron_printed(load):
    data = load("measured").read("megatron_curve")
    assert data["ours"] == pytest.approx(data["megatron"], abs=3e-6)
    assert data["ours_validation"] == pytest.approx(data["megatron_validation"], abs=3e-6)


def test_the_plan_is_compiled_and_its_parts_sum_up(load):
    data = load("measured").read("plan_175b")
    parts = data["step_parts_expected"]
    assert data["peak_is"] == "compiled"
    assert sum(data["memory"].values()) == data["peak_bytes_per_gpu"]
    names = ("matmul", "attention", "elementwise", "exposed", "bubble")
    assert sum(parts[name] for name in names) == pytest.approx(parts["seconds"])


def test_no_layout_that_stays_beats_the_one_that_is_found_for_a_batch_size(load):
    """By more than the 5% by which what closed forms rank first may be slower when compiled."""
    ramp, data = load("ramp"), load("measured").read("ramp")
    batches = dict(data["batches"])
    found = batches.pop(ramp.FOUND)
    assert [row["batch_size"] for row in found] == [16, 320, 624, 928, 1232, 1536]
    assert sum(row["tokens"] for row in found) == data["tokens"]
    for name, rows in batches.items():
        for ours, theirs in zip(found, rows, strict=True):
            assert theirs["batch_size"] == ours["batch_size"]
            seconds = theirs["step_seconds"] or float("inf")  # the layout cannot cut the batch
            assert ours["step_seconds"] < 1.05 * seconds, f"{name}: {ours} {theirs}"
    assert data["days"][ramp.FOUND] == min(data["days"].values())


def test_twenty_kills_changed_no_bit(load):
    data = load("measured").read("killed")
    assert sum(data["moments"].values()) == 20 and len(data["starts"]) == 21
    assert data["killed"] == data["undisturbed"] and data["differences"] == []
    lasts = [0, *(last for _, last in data["starts"])]
    for (first, _), last in zip(data["starts"], lasts, strict=False):
        assert first <= last, "steps were left out"
