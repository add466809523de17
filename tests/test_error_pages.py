"""Each error that a user can fix ends with the page that says more, and the page is there.

That every error names one is mypy's to check: `errors.UserError` requires it.
"""

import ast
import functools
import importlib
import re
import sys

import pytest

from gpt3jax import errors
from gpt3jax.preflight import checks

import corpus
import documents

CAUGHT = {"UserError", "TransientError", "DamagedError", "ChangedError"}


@functools.cache
def parsed():
    """Return (file, all nodes) of each file of the package."""
    return [
        (file.relative_to(documents.REPOSITORY), list(ast.walk(ast.parse(file.read_text()))))
        for file in documents.python_files("gpt3jax")
    ]


def nodes(kind):
    """Return (file:line, node) of each node of a kind in the package."""
    return [
        (f"{file}:{node.lineno}", node)
        for file, found in parsed()
        for node in found
        if isinstance(node, kind)
    ]


def pages():
    """Return (file:line, page) of each text of the code that is a page, wherever it stands."""
    return [
        (place, node.value)
        for place, node in nodes(ast.Constant)
        if isinstance(node.value, str) and re.fullmatch(r"[\w/]+\.md(#.*)?", node.value)
    ]


def test_every_page_is_there_with_its_heading():
    faults = [
        f"{place}: docs/{page}: no such page or heading"
        for place, page in pages()
        if not documents.leads_to_a_heading(page)
    ]
    assert len(pages()) > 100 and not faults, documents.told(faults)


def test_the_site_makes_the_anchors_that_github_makes():
    slugs = pytest.importorskip("pymdownx.slugs", reason="of the site's tools")
    of_the_site = slugs.slugify(case="lower")
    for page in {page.partition("#")[0] for _, page in pages()}:
        file = documents.REPOSITORY / "docs" / page
        titles = re.findall(r"(?m)^#+ (.*)$", file.read_text())
        assert {of_the_site(title, "-") for title in titles} == documents.headings(file), page


def test_a_message_leaves_the_page_to_the_error():
    """Neither a document stands in a message, nor the whole text of another error."""
    faults = [
        f"{place}: give the document as `page`"
        for place, call in nodes(ast.Call)
        if ast.unparse(call.func).split(".")[-1] in CAUGHT | {"kind"}
        if "docs/" in "".join(map(ast.unparse, call.args))
    ]
    faults += [
        f"{place}: write {{{handler.name}.message}}, whose page does not stand in the middle"
        for place, handler in nodes(ast.ExceptHandler)
        if handler.name and CAUGHT & set(re.findall(r"\w+", ast.unparse(handler.type)))
        for text in map(ast.unparse, texts(handler))
        if f"{{{handler.name}}}" in text and "gpt3jax: error: " not in text
    ]
    assert not faults, documents.told(faults)


def texts(handler):
    return [node for node in ast.walk(handler) if isinstance(node, ast.JoinedStr)]


def test_an_error_has_its_page_at_the_end():
    for kind in (errors.UserError, errors.TransientError):
        error = kind("it is full: make room", page="checkpoints.md#saving")
        assert str(error) == "it is full: make room (see docs/checkpoints.md#saving)"
        assert error.message == "it is full: make room"
        with pytest.raises(TypeError, match="page"):
            kind("it is full: make room")


# For each room, a line that it refuses, and the page.
REFUSED = {
    "config": ("main --config=nowhere.py", "training.md#recipes"),
    "distributed": (
        "main --config=recipe.py --distributed.n-processes=2",
        "launching.md#how-processes-find-each-other",
    ),
    "sharding": (
        "main --config=recipe.py --mesh.data=3",
        "parallelism.md#which-sizes-are-possible",
    ),
    "model": (
        "main --config=recipe.py --model.attention.implementation=cudnn "
        "--precision.compute-dtype=bfloat16",
        "reference/options.md#model",
    ),
    "step": ("main --config=recipe.py --train.n-samples=3B", "reference/options.md#train"),
    "checkpoint": ("checkpoint.__main__ show nowhere", "checkpoints.md#looking-into-a-folder"),
    "data": ("data.inspect nowhere", "data.md#when-data-is-refused"),
    "hardware": ("plan.__main__ --config=recipe.py --gpus=8 --gpu=abacus", "plan.md"),
    "plan": (
        "plan.__main__ --config=recipe.py --gpus=4",
        "parallelism.md#which-sizes-are-possible",
    ),
    "run": (
        "main --config=recipe.py --train.replay-step=41",
        "numerical_faults.md#is-it-the-machine",
    ),
    "convert": ("convert.__main__ from-hf . --output=x", "converting.md#hugging-face"),
    "sample": ("sample.__main__ --checkpoint=x --prompt=x --prompts=x", "sampling.md"),
    "evaluate": ("evaluate.__main__ --checkpoint=x", "evaluation.md"),
}


@pytest.mark.parametrize("room", REFUSED)
def test_an_error_of_each_room_ends_with_its_page(room, tmp_path, monkeypatch, capfd):
    line, page = REFUSED[room]
    module, *args = line.split()
    monkeypatch.chdir(corpus.write_run(tmp_path))
    monkeypatch.setattr(sys, "argv", [module, *args])
    assert importlib.import_module(f"gpt3jax.{module}").main() == errors.REFUSED
    last = capfd.readouterr().err.splitlines()[-1]
    assert last.startswith("gpt3jax: error: ") and last.endswith(f" (see docs/{page})"), last
    assert documents.points_on(last)


def test_what_only_several_processes_meet_ends_with_its_page():
    failed = checks.Check(name="code", status="fail", result="two versions", lines=())
    with pytest.raises(errors.UserError) as error:
        checks.refuse([failed], 0)
    assert documents.points_on(str(error.value))
