"""Renews what comes from the code in documents: options, commands, metrics, the list of decisions.

    python docs/reference/generate.py

A page says where such a part begins, and which of `PARTS` it is: `<!-- generated: options -->`.
`make docs` runs this, and a test compares the pages with what it would write.
"""

import ast
import dataclasses
import html
import importlib
import inspect
import itertools
import pathlib
import re
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from unittest import mock

import tyro

from gpt3jax.config import ranges, schema, user_paths
from gpt3jax.record import metrics, tensorboard
from gpt3jax.watch import goodput, phases, stragglers

DOCS = pathlib.Path(__file__).parents[1]
COMMANDS = (
    "checkpoint", "convert", "data.inspect", "data.merge", "data.prepare", "evaluate",
    "main", "plan", "preflight", "report", "sample", "summary",
)  # fmt: skip
_PART = re.compile(r"(<!-- generated: (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
_OPTION = ("option", "meaning", "values", "default")
_OF_CONFIG = "all [options of the config](options.md), which override the recipe."
_NAMES = {int: "integer", float: "number", str: "text"}
_AUTO = typing.Literal["auto"]


class Asked(BaseException):
    """A command asks tyro to parse its options."""

    def __init__(self, kind: type, takes_config: bool) -> None:
        self.kind, self.takes_config = kind, takes_config


def pages() -> dict[pathlib.Path, str]:
    """Return the pages with generated parts, and what they should be."""
    texts = {file: file.read_text() for file in sorted(DOCS.rglob("*.md"))}
    return {file: _PART.sub(_renewed, text) for file, text in texts.items() if _PART.search(text)}


def _renewed(match: re.Match[str]) -> str:
    return f"{match[1]}\n{PARTS[match[2]]()}\n\n{match[3]}"


def options() -> str:
    """Return the options of the config, group by group."""
    (_, config), *inner = groups(schema.Config)
    return "\n\n".join(
        [table(_OPTION, option_rows(config))]
        + [
            f"## {prefix.removesuffix('.')}\n\n{inspect.getdoc(kind)}\n\n"
            + table(_OPTION, option_rows(kind, prefix))
            for prefix, kind in inner
        ]
    )


def groups(kind: type, prefix: str = "") -> Iterator[tuple[str, type]]:
    """Yield the prefix of the options of a dataclass, and it; then the same of those inside."""
    yield prefix, kind
    for name, hint in typing.get_type_hints(kind, include_extras=True).items():
        inner, marks = split(hint)
        if dataclasses.is_dataclass(inner):
            is_flat = tyro.conf.OmitArgPrefixes in marks
            yield from groups(inner, prefix if is_flat else f"{prefix}{name}.")


def commands() -> str:
    """Return a table of all commands, and a section on each."""
    rows, sections = [], []
    for name in COMMANDS:
        module, title = module_of(name), f"gpt3jax.{name}"
        rows.append((f"[`{title}`](#{title.replace('.', '')})", purpose(module)))
        sections.append(f"## {title}\n\n{inspect.getdoc(module)}\n\n{command_options(name)}")
    return "\n\n".join([table(("command", "what it does"), rows), *sections])


def module_of(command: str) -> types.ModuleType:
    """Return the module that a command runs."""
    module = importlib.import_module(f"gpt3jax.{command}")
    is_package = hasattr(module, "__path__")
    return importlib.import_module(f"gpt3jax.{command}.__main__") if is_package else module


def purpose(module: types.ModuleType) -> str:
    """Return the first sentence of a command's docstring, without the command itself."""
    text = re.sub(r"^`.*`[:.]\s+", "", inspect.getdoc(module) or "")
    sentence = " ".join(re.split(r"(?<=\.)\s", text)[0].split())
    return sentence[0].upper() + sentence[1:]


def command_options(command: str) -> str:
    """Return tables of a command's own options, one for each of its subcommands."""
    asked = asked_by(command)
    if asked.kind is schema.Config:
        return f"It takes `--config`, the recipe, and {_OF_CONFIG}"
    parts = []
    for kind in typing.get_args(asked.kind) or (asked.kind,):
        if typing.get_origin(kind) is typing.Annotated:
            kind, subcommand = typing.get_args(kind)
            parts.append(f"### gpt3jax.{command} {subcommand.name}\n\n{inspect.getdoc(kind)}")
        own = [(prefix, part) for prefix, part in groups(kind) if part is not schema.Mesh]
        rows = [row for prefix, part in own for row in option_rows(part, prefix)]
        parts.append(table(_OPTION, rows))
        if len(own) < len(list(groups(kind))):
            parts.append("It also takes the [options of the mesh](options.md#mesh).")
    return "\n\n".join([*parts, *([f"It also takes {_OF_CONFIG}"] if asked.takes_config else [])])


def asked_by(command: str) -> Asked:
    """Start a command, up to where it asks tyro to parse its options; return what it asks for."""

    def ask(kind: type, *, return_unknown_args: bool = False, **_: object) -> None:
        raise Asked(kind, return_unknown_args)

    with mock.patch.object(tyro, "cli", ask), mock.patch.object(sys, "argv", [command, "--help"]):
        try:
            module_of(command).main()
        except Asked as asked:
            return asked
    raise AssertionError(f"gpt3jax.{command} parses no options")


def option_rows(kind: type, prefix: str = "") -> Iterator[tuple[str, ...]]:
    """Yield the rows of the options of a dataclass itself: names, meaning, values, default."""
    texts = docstrings(kind)
    hints = typing.get_type_hints(kind, include_extras=True)
    for field in dataclasses.fields(kind):
        hint, marks = split(hints[field.name])
        name = field.name.replace("_", "-")
        if dataclasses.is_dataclass(hint):
            continue
        names = f"`--{prefix}{name}`"
        if tyro.conf.Positional in marks:
            names = f"`{name.upper()}` (by position)"
        elif hint is bool:
            names += f" `--{prefix}no-{name}`"
        yield names, in_table(texts[field.name]), values(hint, marks), default(field)


def split(hint: object) -> tuple[object, tuple[object, ...]]:
    """Return a type without what is annotated, and what is annotated."""
    is_annotated = typing.get_origin(hint) is typing.Annotated
    kind, *marks = typing.get_args(hint) if is_annotated else (hint,)
    return kind, tuple(marks)


def docstrings(kind: type) -> dict[str, str]:
    """Return the docstrings of a dataclass's fields: the texts that follow them in the source."""
    (cls,) = ast.parse(textwrap.dedent(inspect.getsource(kind))).body
    return {
        field.target.id: inspect.cleandoc(text.value.value)
        for field, text in itertools.pairwise(cls.body)
        if isinstance(field, ast.AnnAssign) and isinstance(text, ast.Expr)
    }


def values(hint: object, marks: tuple[object, ...] = ()) -> str:
    """Return what values an option takes, in words."""
    inner = [split(part) for part in typing.get_args(hint) if part not in (types.NoneType, ...)]
    if typing.get_origin(hint) is typing.Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(hint))
    if typing.get_origin(hint) is tuple:
        n = "any number" if ... in typing.get_args(hint) else len(inner)
        return f"{n} of: {values(*inner[0])}"
    if _AUTO in (part for part, _ in inner):
        kind = inner[0][0]
        return "`auto`, `True`, `False`" if kind is bool else f"`auto` or {values(kind, marks)}"
    if inner:  # a type or None
        return values(inner[0][0], inner[0][1] + marks)
    if hint is bool:
        return "switch"
    is_path = user_paths.Path.__metadata__[0] in marks
    word = "count" if ranges.READS_COUNTS in marks else "path" if is_path else _NAMES[hint]
    bounds = next((mark for mark in marks if isinstance(mark, ranges.Range)), None)
    if bounds is None:
        return word
    excluded = "" if bounds.excluded is None else f", not {bounds.excluded:g}"
    return f"{word}, {bounds.least:,.10g} to {bounds.most:,.10g}{excluded}"


def default(field: "dataclasses.Field[object]") -> str:
    """Return the default of an option, in words."""
    value = field.default
    if value is dataclasses.MISSING:
        is_required = field.default_factory is dataclasses.MISSING
        return "required" if is_required else "of the machine"
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value in ("", ()):
        return "unset"
    if isinstance(value, tuple):
        return f"`{' '.join(map(str, value))}`"
    if "|" in str(value):  # which ends a cell of a table on GitHub, in code too
        return f"<code>{html.escape(str(value)).replace('|', '&#124;')}</code>"
    return f"`{value:.10g}`" if isinstance(value, float) else f"`{value}`"


def tag_meanings(tags: Mapping[str, str]) -> dict[str, str]:
    """Return the meaning of each tag of TensorBoard, from the values that the tags show."""
    known = metrics.STEP | metrics.EVALUATION | metrics.TENSORBOARD
    return {tag: known[name] for tag, name in tags.items()}


def decisions() -> str:
    """Return a list of the decisions."""
    files = sorted((DOCS / "decisions").glob("[0-9]*.md"))
    titles = [(file.name, file.read_text().splitlines()[0].removeprefix("# ")) for file in files]
    return "\n".join(f"- [{title.replace('.', ':', 1)}]({name})" for name, title in titles)


def meanings(title: str, texts: Mapping[str, str]) -> str:
    """Return a table of names and what they mean."""
    rows = [(f"`{name}`", in_table(text)) for name, text in texts.items()]
    return table((title, "meaning"), rows)


def table(titles: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    """Return a table in Markdown."""
    lines = [titles, ("---",) * len(titles), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def in_table(text: str) -> str:
    """Return a text in one line, without characters that mean something in a table."""
    return re.sub(r"([|*<])", r"\\\1", " ".join(text.split()))


PARTS: dict[str, Callable[[], str]] = {
    "options": options,
    "commands": commands,
    "decisions": decisions,
    "steps": lambda: meanings("field", metrics.STEP),
    "evaluations": lambda: meanings("field", metrics.EVALUATION),
    "step_tags": lambda: meanings("tag", tag_meanings(tensorboard.TAGS)),
    "evaluation_tags": lambda: meanings("tag", tag_meanings(tensorboard.EVALUATION_TAGS)),
    "speed_tags": lambda: meanings("tag", tag_meanings(tensorboard.STEP_TAGS)),
    "memory_tags": lambda: meanings("tag", tag_meanings(tensorboard.MEMORY_TAGS)),
    "process_tags": lambda: meanings("tag", stragglers.TAGS),
    "time_tags": lambda: meanings("tag", goodput.TAGS),
    "starts": lambda: meanings("field", docstrings(goodput.Start)),
    "phases": lambda: meanings("phase", phases.MEANINGS),
}

if __name__ == "__main__":
    for page, content in pages().items():
        page.write_text(content)
