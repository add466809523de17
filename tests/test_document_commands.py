"""Each command of a document is one that its program takes. Nothing is run, only parsed.

Words that stand for others are filled in: RECIPE.py by a recipe, N by a number.
"""

import contextlib
import importlib
import importlib.util
import io
import pathlib
import re
import shlex
import subprocess
import sys
import tomllib

import pytest
import tyro

from gpt3jax import errors
from gpt3jax.config import recipe, validation
from gpt3jax.plan import compiler

import documents

REPOSITORY = documents.REPOSITORY
RECIPE = f"--config={REPOSITORY / 'configs' / 'quickstart.py'}"  # one that names its corpus
# The package's commands, and what each cannot do without, where a text gives a few options alone.
COMMANDS = {
    "gpt3jax.main": [RECIPE],
    "gpt3jax.plan": [RECIPE, "--gpus=8"],
    "gpt3jax.preflight": [RECIPE],
    "gpt3jax.sample": ["--checkpoint=CKPT"],
    "gpt3jax.evaluate": ["--checkpoint=CKPT"],
    "gpt3jax.data.prepare": ["--input=FILE", "--output-prefix=PREFIX"],
    "gpt3jax.data.merge": ["--input=FILE", "--output-prefix=PREFIX"],
    "gpt3jax.data.inspect": [],
    "gpt3jax.checkpoint": [],
    "gpt3jax.convert": [],
    "gpt3jax.report": [],
    "gpt3jax.summary": [],
}
# Processes that another command starts, and what launch/ starts commands with.
PARTS_OF_COMMANDS = {"gpt3jax.plan.compiler", "gpt3jax.distributed.launch"}
SUBCOMMANDS = {
    "gpt3jax.checkpoint": ["list", "show", "verify"],
    "gpt3jax.convert": ["from-hf", "to-hf", "from-megatron", "to-megatron"],
}
# Of docker and buildah, Slurm, TensorBoard, lm-eval and Megatron-LM.
OTHER_OPTIONS = {
    "--user", "--init", "--shm-size", "--ulimit", "--network", "--device", "--build-arg",
    "--kill-on-bad-exit", "--signal", "--batch", "--requeue", "--nodes", "--gpus-per-task",
    "--wait", "--cpu-bind", "--isolation", "--ntasks-per-node", "--export", "--logdir",
    "--data-path", "--model",
}  # fmt: skip
OPTION = r"(?<![\w-])--[a-z](?:[\w.-]*\w)?(?![\w.-]*\*)"


class Parsed(BaseException):
    """A command took its arguments."""


class Refused(BaseException):
    """A command did not take them, and says why."""


@pytest.fixture
def parse(monkeypatch, tmp_path):
    """Return a function that parses a command's arguments: "" if it takes them, else what it says.

    It stops a command where it has parsed its options, and its recipe if it takes one.
    """
    monkeypatch.chdir(tmp_path)  # for files that are tried before a recipe is parsed
    monkeypatch.setenv("COLUMNS", "200")
    parse_options, parse_recipe, in_recipe = tyro.cli, recipe.parse, []

    def take_options(*args, **kwargs):
        options = parse_options(*args, **kwargs)
        if in_recipe or kwargs.get("return_unknown_args"):
            return options
        raise Parsed

    def take_recipe(*args):
        in_recipe.append(True)
        try:
            parse_recipe(*args)
        except errors.UserError as error:
            raise Refused(str(error)) from None
        finally:
            in_recipe.pop()
        raise Parsed

    monkeypatch.setattr(tyro, "cli", take_options)
    monkeypatch.setattr(recipe, "parse", take_recipe)

    def call(name, args):
        module = importlib.import_module(name)
        if hasattr(module, "__path__"):
            module = importlib.import_module(f"{name}.__main__")
        monkeypatch.setattr(sys, "argv", [name, *args])
        told = io.StringIO()
        with contextlib.redirect_stderr(told), contextlib.redirect_stdout(told):
            try:
                module.main()
            except Parsed:
                return ""
            except Refused as refused:
                return str(refused)
            except SystemExit:
                pass
        return " ".join(re.sub("[─-╿]+", " ", told.getvalue()).split()) or "it says nothing"

    return call


def all_lines():
    """Return (place, text, whether it is whole) of all that may be a command.

    Those of a block are whole; those in a sentence may leave out what goes without saying.
    """
    found = []
    of = [*documents.markdown(), *documents.of_golden_files(), *documents.docstrings()]
    for document in of:
        found += [(place, line, True) for place, line in document.commands()]
        found += [(place, span, False) for place, span in document.spans()]
    return found


def arguments(text):
    """Return the words of a command, up to its end, with what stands for others filled in."""
    text = text.replace("[the options of the run]", "--data.paths PREFIX")
    text = re.sub(r"[][]", "", text.replace(" | --", " --"))  # [--step N | --all]
    text = text.replace("--config=...", RECIPE).replace("--group.field VALUE ...", "")
    words = []
    for word in shlex.split(text, comments=True):
        if word in ("|", ";", "&&", "&", ">"):
            break
        option, equals, value = word.rpartition("=")
        words.append(f"{option}{equals}{filled_in(value)}")
    return [word for word in words if word != "..."]


def filled_in(value):
    if re.fullmatch(r"[A-Z]|FIRST|LAST", value):
        return "1"
    if value.startswith("configs/"):
        return str(REPOSITORY / value)
    return RECIPE.partition("=")[2] if value in ("RECIPE", "RECIPE.py") else value


def of_the_package(line):
    """Yield module and arguments of `python -m gpt3jax.NAME ...`; of {a,b} those of each."""
    choice = re.search(r"\{(\w+(?:,\w+)+)\}", line)
    for one in choice[1].split(",") if choice else [""]:
        text = line.replace(choice[0], one) if choice else line
        if match := re.search(r"python -m (gpt3jax(?:\.\w+)*)(.*)", text):
            yield match[1], arguments(match[2])


def test_commands_of_the_package_take_what_documents_give_them(parse):
    faults, n_parsed = [], 0
    for place, line, whole in all_lines():
        for name, args in of_the_package(line):
            if name.endswith(".MODULE"):
                continue
            if name not in COMMANDS:
                faults += [] if starts(name) else [f"{place}: there is no command {name}"]
            elif (args or whole) and "--help" not in args:
                refused = parse(name, [*([] if whole else COMMANDS[name]), *args])
                faults += [f"{place}: `{line}`: {refused}"] if refused else []
                n_parsed += 1
    assert not faults, documents.told(faults)
    assert n_parsed > 50, "the documents' commands are not found any more"


def test_the_readme_has_a_row_for_every_command_and_no_other():
    package = REPOSITORY / "gpt3jax"
    started = [
        f for f in documents.python_files("gpt3jax") if '__name__ == "__main__"' in f.read_text()
    ]
    started += [file.parent for file in package.rglob("__main__.py")]
    names = {".".join(f.relative_to(REPOSITORY).with_suffix("").parts) for f in started}
    commands = {n for n in names if not n.endswith(".__main__")} - PARTS_OF_COMMANDS
    assert set(COMMANDS) == commands
    table = (REPOSITORY / "README.md").read_text()
    rows = re.findall(r"(?m)^\| \[`([\w.]+)`\]\(docs/.*\) \| ", table)
    assert sorted(f"gpt3jax.{row}" for row in rows) == sorted(commands)


def starts(name):
    """Tell whether a module is one that `python -m` starts, though for the package itself alone."""
    file = REPOSITORY / f"{name.replace('.', '/')}.py"
    return file.is_file() and "__main__" in file.read_text()


def test_benchmarks_take_what_documents_give_them(monkeypatch):
    faults = []
    for place, line, _ in all_lines():
        for name, text in re.findall(r"(?:^|python )benchmarks/(\w+)\.py ?(.*)", line):
            args = arguments(text)
            if name == "data":
                args += ["--vocab-file=vocab.json", "--merge-file=merges.txt"]
            refused = refused_by_benchmark(monkeypatch, name, args) if args else ""
            faults += [f"{place}: `{line}`: {refused}"] if refused else []
    assert not faults, documents.told(faults)


def refused_by_benchmark(monkeypatch, name, args):
    """Return what a benchmark, all extras there, says to arguments that it does not take."""
    path = REPOSITORY / "benchmarks" / f"{name}.py"
    if not path.is_file():
        return f"there is no {path.name}"
    spec = importlib.util.spec_from_file_location(f"benchmark_{name}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with monkeypatch.context() as patch, contextlib.redirect_stderr(io.StringIO()) as told:
        patch.setattr(importlib.util, "find_spec", lambda _: True)
        patch.setattr(compiler, "missing_extra", lambda: "")
        try:
            parsed = module.parse(args)
            if name == "train_step" and not parsed[0].cpu_peers:
                recipe.parse(parsed[1])
        except errors.UserError as error:
            return str(error)
        except SystemExit:
            return told.getvalue().splitlines()[-1]
    return ""


def test_make_has_the_targets_that_documents_name(parse):
    targets = re.findall(r"(?m)^([a-z-]+):", (REPOSITORY / "Makefile").read_text())
    faults = []
    for place, line, _ in all_lines():
        if match := re.match(r"make ([a-z-]+)(.*)", line):
            if match[1] not in targets:
                faults.append(f"{place}: make has no target {match[1]}")
            args = dict(word.partition("=")[::2] for word in shlex.split(match[2], comments=True))
            if match[1] == "quickstart" and "ARGS" in args:
                refused = parse("gpt3jax.main", [RECIPE, *shlex.split(args["ARGS"])])
                faults += [f"{place}: `{line}`: {refused}"] if refused else []
    assert not faults, documents.told(faults)


def test_arguments_over_two_lines_are_one_command():
    """Make would run the second line as a command of its own, and train without it."""
    args = "--train.n-steps 20 --checkpoint.dir ''\n--log.dir ''"
    told = subprocess.run(
        ["make", "--no-print-directory", "--dry-run", "quickstart", f"ARGS={args}"],
        cwd=REPOSITORY, capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert told.splitlines()[-1].endswith(f"configs/quickstart.py {args.replace(chr(10), ' ')}")


def test_a_command_in_a_sentence_is_on_one_line():
    """Copied from the file, its second line would be a command of its own."""
    broken = [
        f"{place}: `{match[1]}`"
        for document in documents.markdown()
        for place, match in document.found(r"`((?:make|pip|python|git|hf)\s[^`]+)`")
        if "\n" in match[1]
    ]
    assert not broken, documents.told(broken)


def test_extras_and_tests_that_commands_name_exist():
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())
    extras = project["project"]["optional-dependencies"]
    marks = [mark.split(":")[0] for mark in project["tool"]["pytest"]["ini_options"]["markers"]]
    faults = []
    for place, line, _ in all_lines():
        for found in re.findall(r"pip install .*?(?:gpt3jax|\.)\[([\w,-]+)\]", line):
            faults += [f"{place}: no extra {e}" for e in found.split(",") if e not in extras]
        if match := re.search(r"\bpytest (.*)", line):
            words = arguments(match[1])
            paths = [word for word in words if "/" in word]
            faults += [f"{place}: no {p}" for p in paths if not (REPOSITORY / p).exists()]
            if words[0] == "-m" and words[1] not in marks:
                faults.append(f"{place}: no tests are marked {words[1]}")
    assert not faults, documents.told(faults)


def test_options_that_texts_name_are_options(parse):
    """In the pages on Megatron-LM's those of groups alone: all others are its own."""
    known = known_options(parse)
    faults = []
    for document in [*documents.markdown(), *documents.docstrings()]:
        of_megatron = document.file.name == "from_megatron.md"
        whole = [(document.place(m.start()), m[0]) for m in re.finditer(OPTION, document.text)]
        of_groups = [(place, option) for place, option in whole if "." in option]
        for place, span in [*document.spans(), *of_groups]:
            for option in re.findall(OPTION, span):
                theirs = (of_megatron and "." not in option) or option.startswith("--xla_")
                if not theirs and option not in known | OTHER_OPTIONS:
                    faults.append(f"{place}: no command has the option {option}")
    assert not faults, documents.told(faults)


def test_values_that_texts_give_to_fields_are_of_their_type(parse, monkeypatch):
    """As in `--mesh.fsdp 512 --model.remat mlp`; whether they go together is not asked."""
    monkeypatch.setattr(validation, "validate", lambda _: None)
    given = []
    for place, span, _ in all_lines():
        words = arguments(span) if span.startswith("--") else []
        options = [word for word in words if word.startswith("--")]
        if len(words) > 1 and all("." in word and "*" not in word for word in options):
            given.append((place, span, words))
    assert len(given) > 15, "the documents' options are not found any more"
    if parse("gpt3jax.main", [RECIPE, *(word for *_, words in given for word in words)]):
        each = [
            (place, span, parse("gpt3jax.main", [RECIPE, *words])) for place, span, words in given
        ]
        faults = [f"{place}: `{span}`: {refused}" for place, span, refused in each if refused]
        raise AssertionError(documents.told(faults))


def test_the_reference_has_the_options_that_help_shows(parse):
    pages = (REPOSITORY / "docs" / "reference" / f"{name}.md" for name in ("options", "commands"))
    text = "\n".join(page.read_text() for page in pages)
    rows = " ".join(re.findall(r"(?m)^\| (`--[^|]*)", text))
    shown = options_of_commands(parse)
    assert set(re.findall(OPTION, rows)) <= shown
    assert shown - {"--help"} <= set(re.findall(OPTION, text))  # help names others' options too


def known_options(parse):
    """Return the options of all commands and benchmarks."""
    texts = [pathlib.Path(file).read_text() for file in documents.python_files("benchmarks")]
    return options_of_commands(parse) | set(re.findall(OPTION, "\n".join(texts)))


def options_of_commands(parse):
    """Return the options of all commands, as their help shows them."""
    texts = []
    for name, needed in COMMANDS.items():
        recipe_alone = [word for word in needed if word == RECIPE and name != "gpt3jax.plan"]
        for sub in SUBCOMMANDS.get(name, [None]):
            texts.append(parse(name, [*recipe_alone, *([sub] if sub else []), "--help"]))
    return set(re.findall(OPTION, "\n".join(texts)))
