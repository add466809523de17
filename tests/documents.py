"""What the documents say in code: spans between backticks and blocks of commands, with their place.

A document is a Markdown file, or a docstring (of a module, a class, a function or a field).
"""

import ast
import dataclasses
import pathlib
import re
import textwrap

REPOSITORY = pathlib.Path(__file__).parents[1]
GOLDEN = REPOSITORY / "tests" / "golden"


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, the file it stands in, and the number of its first line there."""

    file: pathlib.Path
    text: str
    first_line: int = 1

    def place(self, offset):
        """Return `file:line` of a character of the text."""
        name = self.file.relative_to(REPOSITORY)
        return f"{name}:{self.first_line + self.text.count(chr(10), 0, offset)}"

    def found(self, pattern):
        """Return (place, match) of each match of a pattern outside of blocks."""
        prose = re.sub(r"(?m)^(?: {4}.*|```(?:.|\n)*?\n```$)", _blank, self.text)
        return [(self.place(m.start()), m) for m in re.finditer(pattern, prose)]

    def spans(self):
        """Return (place, text) of what stands between backticks, outside of blocks."""
        return [(place, " ".join(m[1].split())) for place, m in self.found(r"`([^`]+)`")]

    def commands(self):
        """Return (place, line) of the lines of indented blocks, continued ones joined."""
        joined = re.sub(r"\\\n\s*", lambda m: " " * len(m[0]), self.text)
        lines = re.finditer(r"(?m)^ {4}(\S.*)$", joined)
        return [(self.place(m.start(1)), " ".join(m[1].split())) for m in lines]


def _blank(match):
    return re.sub(r"[^\n]", " ", match[0])


def markdown():
    """Return the documents in Markdown; of the changelog what is not released."""
    files = [REPOSITORY / name for name in ("README.md", "CONTRIBUTING.md", "CHANGELOG.md")]
    files += sorted((REPOSITORY / "docs").glob("*.md"))
    texts = [re.split(r"(?m)^## \[\d", file.read_text())[0] for file in files]
    return [Document(file, text) for file, text in zip(files, texts, strict=True)]


def of_golden_files():
    """Return the documents of what peers computed: they use the peers' words."""
    return [Document(file, file.read_text()) for file in sorted(GOLDEN.rglob("*.md"))]


def docstrings():
    """Return the docstrings of package, recipes and benchmarks, those of fields among them."""
    found = []
    for file in python_files("gpt3jax", "configs", "benchmarks"):
        for node in ast.walk(ast.parse(file.read_text())):
            if is_docstring(node):
                first, *rest = node.value.value.split("\n")
                text = "\n".join([first, textwrap.dedent("\n".join(rest))])
                found.append(Document(file, text, node.lineno))
    return found


def python_files(*folders):
    """Return the Python files of folders of the repository."""
    return sorted(file for folder in folders for file in (REPOSITORY / folder).rglob("*.py"))


def is_docstring(node):
    """Tell a text that stands by itself, as the syntax tree has it."""
    text = node.value if isinstance(node, ast.Expr) else None
    return isinstance(text, ast.Constant) and isinstance(text.value, str)


def told(faults):
    """Return the message of an assertion that there are no faults: one a line."""
    return "\n" + "\n".join(sorted(set(faults)))


def headings(file):
    """Return the anchors that GitHub makes of a file's headings."""
    titles = re.findall(r"(?m)^#+ (.*)$", file.read_text())
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


def leads_to_a_heading(page):
    """Tell whether a page that an error names is in docs/ and has the heading, if it names one."""
    name, _, heading = page.partition("#")
    file = REPOSITORY / "docs" / name
    return file.is_file() and (not heading or heading in headings(file))


def points_on(text):
    """Tell whether an error's last line ends with where to read on, which is nowhere else in it."""
    found = re.findall(r"\(see docs/(\S+)\)", text)
    return (
        len(found) == 1
        and leads_to_a_heading(found[0])
        and text.rstrip().endswith(f"(see docs/{found[0]})")
    )
