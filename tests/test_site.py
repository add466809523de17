"""The site of the documentation: its reference is that of the code, its links lead somewhere."""

import importlib.util
import re
import shutil
import subprocess
import sys

import pytest

from gpt3jax.config import recipe, schema

import documents

REPOSITORY = documents.REPOSITORY
DOCS = REPOSITORY / "docs"
NO_COMMANDS = {"plan.compiler", "distributed.launch"}  # the package itself and launch/ start them


@pytest.fixture(scope="module")
def generate():
    spec = importlib.util.spec_from_file_location("generate", DOCS / "reference" / "generate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_reference_is_that_of_the_code(generate):
    stale = [page for page, text in generate.pages().items() if page.read_text() != text]
    assert not stale, "`make docs` renews them: commit what it writes"
    shown = "".join(page.read_text() for page in generate.pages())
    assert all(f"<!-- generated: {name} -->" in shown for name in generate.PARTS)


def test_every_field_of_the_config_has_an_entry():
    fields = schema.flatten(recipe.load(str(REPOSITORY / "configs" / "345m.py")))
    page = (DOCS / "reference" / "options.md").read_text()
    assert not [name for name in fields if f"| `--{name.replace('_', '-')}`" not in page]


def test_every_command_has_an_entry(generate):
    names = {
        ".".join(file.relative_to(REPOSITORY / "gpt3jax").with_suffix("").parts)
        for file in documents.python_files("gpt3jax")
        if '\nif __name__ == "__main__":' in file.read_text()
    }
    names = {name.removesuffix(".__main__") for name in names} - NO_COMMANDS
    assert names == set(generate.COMMANDS)


@pytest.fixture
def build(tmp_path):
    """Return a function that builds the site, with a text added to its start: status and page."""
    pytest.importorskip("material", reason="needs the extra docs")
    shutil.copytree(DOCS, tmp_path / "docs")
    for name in ("mkdocs.yml", "CONTRIBUTING.md", "CHANGELOG.md", "README.md"):
        shutil.copy(REPOSITORY / name, tmp_path)

    def call(text=""):
        with open(tmp_path / "docs" / "index.md", "a") as page:
            page.write(f"\n{text}\n")
        command = [sys.executable, "-m", "mkdocs", "build", "--strict"]
        status = subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode
        return status, tmp_path / "site"

    return call


@pytest.mark.slow
def test_the_site_needs_no_other_host(build):
    status, site = build()
    assert status == 0
    loaded = r"""<(?:script|link|img|iframe)\b[^>]*(?:src|href)=["']?(?:https?:)?//[^>]*"""
    assert not [m for file in site.rglob("*.html") for m in re.findall(loaded, file.read_text())]
    loaded = r"""(?:url\(|@import )["']?(?:https?:)?//.*"""
    assert not [m for file in site.rglob("*.css") for m in re.findall(loaded, file.read_text())]
    assert "max-failed-saves" in (site / "search" / "search_index.js").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("link", ["no_page.md", "plan.md#no-heading", "../no_file.py", "plan"])
def test_a_dead_link_is_an_error(build, link):
    assert build(f"[dead]({link})")[0] == 1


@pytest.mark.slow
def test_links_to_other_files_of_the_repository_are_not_dead(build):
    status, site = build("See [the front](../README.md) and [style](../CONTRIBUTING.md#style).")
    page = (site / "index.html").read_text()
    assert status == 0
    assert 'See the front and <a href="CONTRIBUTING.html#style">style</a>.' in page
