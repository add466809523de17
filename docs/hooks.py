"""Hooks of mkdocs: pages from the root of the repository, and links to what the site does not have.

On GitHub a link may lead to any file. On the site, a link to a file that is not on it becomes its
text; a link to nothing stays as it is, so that mkdocs finds it.
"""

import pathlib
import posixpath
import re

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

REPOSITORY = pathlib.Path(__file__).parents[1]
FROM_ROOT = ("CONTRIBUTING.md", "CHANGELOG.md")
LINK = re.compile(r"\[([^]]+)\]\((?!https?:|mailto:|#)([^)#\s]+)(#[^)\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the pages from the root."""
    for name in FROM_ROOT:
        files.append(File.generated(config, name, abs_src_path=str(REPOSITORY / name)))
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn links that are right on GitHub into those of the site."""
    here = page.file.src_uri
    folder = "" if here in FROM_ROOT else posixpath.join("docs", posixpath.dirname(here))
    on_site = {
        file.src_uri if file.src_uri in FROM_ROOT else f"docs/{file.src_uri}": file.src_uri
        for file in files
        if not file.inclusion.is_excluded()
    }

    def of_site(match: re.Match[str]) -> str:
        text, target, anchor = match.groups()
        file = posixpath.normpath(posixpath.join(folder, target))
        if file in on_site:
            uri = posixpath.relpath(on_site[file], posixpath.dirname(here) or ".")
            return f"[{text}]({uri}{anchor or ''})"
        return text if (REPOSITORY / file).exists() else match[0]

    return LINK.sub(of_site, markdown)
