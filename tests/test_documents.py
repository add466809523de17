"""What documents and docstrings name exists: files, modules, fields, options, messages, figures.

A failure says file and line of what is stale. What is named and is not ours stands in a list here.
"""

import ast
import functools
import importlib
import importlib.util
import inspect
import json
import pathlib
import re
import tomllib

import numpy as np
import pytest

from gpt3jax.config import recipe, schema
from gpt3jax.hardware import gpus

import documents

REPOSITORY = documents.REPOSITORY
PACKAGES = ["gpt3jax"] + [
    f"gpt3jax.{init.parent.name}" for init in sorted((REPOSITORY / "gpt3jax").glob("*/__init__.py"))
]
FIELDS = set(schema.flatten(recipe.load(str(REPOSITORY / "configs" / "345m.py"))))
# Of Megatron-LM, of a reader, or of what is told of the making of golden files.
OTHER_FILES = {
    "RECIPE.py", "utils.py", "__main__.py", "vocab.json", "merges.txt", "pretrain_gpt.py",
    "preprocess_data.py",
    "tools/preprocess_data.py", "tools/merge_datasets.py", "report_theoretical_memory.py",
    "megatron/core/datasets/indexed_dataset.py", "core/num_microbatches_calculator.py",
    "blended_dataset.py", "blended_megatron_dataset_builder.py", "gpt_dataset.py", "clip_grads.py",
    "grad_scaler.py", "optimizer_param_scheduler.py", "config.json", "tokenizer_config.json",
    ".bin/.idx",
}  # fmt: skip
OTHER_NAMES = {
    "GPT2LMHeadModel.from_pretrained", "lm_eval.simple_evaluate", "params.blocks",
    "stream_executor.GpuTargetConfigProto", "PREFIX.bin.partial",
    "stream_options.include_usage", "gpt3jax.MODULE", "group.field",
}  # fmt: skip
OTHER_WORDS = {
    "VmHWM", "_sharding", "damaged-STEP", "model_args", "torch_dist", "GPUS_PER_NODE",
    "CUDA_DEVICE_MAX_CONNECTIONS", "optim_grads_params", "NCCL_SOCKET_IFNAME", "NCCL_IB_HCA",
    "ExcNodeList", "N-1", "_RANK", "base_url", "local-completions", "WANDB_BASE_URL", "WANDB_NOTES",
    "WANDB_RUN_GROUP", "WANDB_TAGS", "WANDB_ERROR_REPORTING",
}  # fmt: skip
OTHER_MESSAGES = {"Unable to initialize backend 'cuda'"}  # of JAX
OTHER_PROGRAMS = (
    "make", "pytest", "pip", "git", "srun", "mpirun", "sbatch", "scancel", "scontrol", "kubectl",
    "docker", "prepare", "nvidia-smi", "python", "launch/",
)  # fmt: skip


def all_documents():
    return [*documents.markdown(), *documents.docstrings()]


@pytest.mark.parametrize("of_golden_files", [False, True])
def test_files_and_folders_exist(of_golden_files):
    of = documents.of_golden_files() if of_golden_files else all_documents()
    faults = [
        f"{place}: `{word}` is not there: name the file or folder that is"
        for document in of
        for place, span in [*document.spans(), *document.commands()]
        for word in paths_in(span, any_suffix=of_golden_files)
        if not path_exists(word, document.file)
    ]
    assert not faults, documents.told(faults)


def paths_in(span, any_suffix):
    """Yield what a span names as a file or folder of the repository."""
    for word in re.split(r"[\s,;|()]+", span):
        word = word.split("=")[-1].rstrip(".:")
        if word in OTHER_FILES or re.search(r"[<>…$~:]|\.\.\.|^[./]*$|^/path|NAME|_TT_", word):
            continue
        ours = re.match(r"(?:gpt3jax|tests|docs|configs|launch|benchmarks|\.ci)/", word)
        source = re.search(r"\w\.(?:py|md|sh|sbatch|yaml|toml)$", word)
        golden = any_suffix and re.search(
            r"^[\w./]+(?:/|\.(?:npz|json|bin|idx|safetensors))$", word
        )
        if ours or source or golden:
            yield word


def path_exists(word, file):
    """Tell whether a path leads somewhere: from the root, the file's folder, or a room's."""
    word = re.sub(r"\.bin/\.idx$", ".bin", word).partition("::")[0]
    beside = [file.parent, REPOSITORY / "gpt3jax" / file.stem]
    roots = [REPOSITORY, *beside, *(REPOSITORY / name for name in ("gpt3jax", "tests", "configs"))]
    return any(list(root.glob(word)) if "*" in word else (root / word).exists() for root in roots)


def test_links_lead_to_a_file_and_a_heading():
    faults = []
    for document in [*documents.markdown(), *documents.of_golden_files()]:
        for place, link in document.found(r"\]\(([^)]+)\)"):
            name, _, heading = link[1].partition("#")
            target = document.file.parent / name if name else document.file
            if not name.startswith("http") and not target.exists():
                faults.append(f"{place}: no file {name}")
            elif heading and heading not in documents.headings(target):
                faults.append(f"{place}: {target.name} has no heading #{heading}")
    assert not faults, documents.told(faults)


def test_modules_fields_and_attributes_exist():
    dotted = r"(?<![\w./*{}-])[A-Za-z_]\w*(?:\.[A-Za-z_]\w*)+(?![\w./*-])"
    a_file = (
        r"\.(?:py|md|jsonl?|npz|bin|idx|txt|ya?ml|safetensors|sh|cpp|sbatch|toml|jinja|process_N)$"
    )
    faults = [
        f"{place}: `{name}` is no field of the config and no name of a module"
        for document in all_documents()
        for place, span in document.spans()
        for name in re.findall(dotted, span)
        if not re.search(a_file, name) and name not in OTHER_NAMES
        if not name_exists(name)
    ]
    assert not faults, documents.told(faults)


def name_exists(name):
    """Tell whether a dotted name is a field, or leads from a module or a class to something."""
    if any(f"{field}.".startswith(f"{name}.") for field in FIELDS):
        return True
    first, *rest = name.split(".")
    if any(has(cls, rest) for cls in classes().get(first, [])):
        return True
    return any(in_module(f"{base}{name}") for base in (*(f"{p}." for p in PACKAGES), ""))


def in_module(name):
    parts = name.split(".")
    for n in range(len(parts), 0, -1):
        try:
            if importlib.util.find_spec(".".join(parts[:n])) is None:
                continue
            rest = parts[n:]
            return not rest or has(importlib.import_module(".".join(parts[:n])), rest)
        except ImportError:
            continue
    return False


def has(thing, names):
    """Tell whether names lead from attribute to attribute, the last perhaps a field's."""
    for name in names:
        if not hasattr(thing, name):
            return name in getattr(thing, "__annotations__", {})
        thing = getattr(thing, name)
    return True


@functools.cache
def classes():
    """Return the classes of the package by name."""
    found = {}
    for file in documents.python_files("gpt3jax"):
        name = ".".join(file.relative_to(REPOSITORY).with_suffix("").parts)
        if "class " in file.read_text() and name != "gpt3jax.evaluate.lm_eval_model":
            module = importlib.import_module(name.removesuffix(".__init__"))
            for cls in vars(module).values():
                if inspect.isclass(cls) and cls.__module__ == module.__name__:
                    found.setdefault(cls.__name__, []).append(cls)
    return found


def test_tests_that_are_named_exist():
    there = {
        node.name
        for file in documents.python_files("tests")
        for node in ast.walk(ast.parse(file.read_text()))
        if isinstance(node, ast.FunctionDef)
    }
    faults = [
        f"{place}: there is no test {name}"
        for document in [*all_documents(), *documents.of_golden_files()]
        for place, span in document.spans()
        for name in re.findall(r"^(?:\S+::)?(test_\w+)(?:\[.*)?$", span)
        if name not in there
    ]
    assert not faults, documents.told(faults)


def test_words_of_the_code_are_in_the_code():
    """Metrics, tags of TensorBoard, phases, variables of the environment, functions."""
    code = words_of_the_code()
    faults = [
        f"{place}: nothing in the code is called `{word}`"
        for document in documents.markdown()
        for place, span in document.spans()
        for word in words_in(span)
        if not re.search(rf"(?<!\w){re.escape(word)}(?!\w)", code)
    ]
    assert not faults, documents.told(faults)


def words_in(span):
    """Return the words of a span that only code has; a span of plain words is one of them."""
    if span.startswith(OTHER_PROGRAMS):
        return []
    if re.fullmatch(r"[a-z]+( [a-z-]+)+", span):
        return [span]
    words = [w for w in re.split(r"[\s,=]+", span) if re.fullmatch(r"_?[A-Za-z][\w-]*", w)]
    return [w for w in words if re.search(r"[_-]|[a-z][A-Z]", w) and w not in OTHER_WORDS]


def words_of_the_code():
    """Return every name and text of the code, docstrings left out, a line each."""
    found = []
    for file in documents.python_files("gpt3jax", "configs", "benchmarks", "tests"):
        if file.name == pathlib.Path(__file__).name:
            continue
        tree = ast.parse(file.read_text())
        docstrings = {id(n.value) for n in ast.walk(tree) if documents.is_docstring(n)}
        for node in ast.walk(tree):
            names = (getattr(node, key, None) for key in ("id", "attr", "name", "arg", "module"))
            found += [name for name in names if isinstance(name, str)]
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found += [node.value] if id(node) not in docstrings else []
    others = [REPOSITORY / "Makefile", REPOSITORY / "pyproject.toml"]
    others += [file for file in (REPOSITORY / "launch").rglob("*") if file.is_file()]
    return "\n".join([*found, *(file.read_text() for file in others)])


@pytest.mark.parametrize("name", ["operations", "numerical_faults", "preflight"])
def test_messages_are_those_that_the_program_prints(name):
    """What stands for a number, a host or a folder cuts a message; each piece must be printed."""
    (document,) = (d for d in documents.markdown() if d.file.stem == name)
    printed = texts_of_the_code()
    stand_in = r"\.\.\.|\bN-1\b|\bDIR(?:/\d+)?\b|\bstep [A-Z]\b|\b[A-Z]\b|(?<![a-z])\d+(?:\.\d+)?"
    stand_in += r"|\(host\)|WARNING: |config: |="
    faults = []
    for place, span in document.spans():
        if len(span.split()) < 4 or span.startswith((*OTHER_PROGRAMS, "--")):
            continue
        for piece in re.split(stand_in, span):
            piece = piece.strip(" ();:,")
            if len(piece.split()) > 1 and piece not in OTHER_MESSAGES and piece not in printed:
                faults.append(f"{place}: nothing prints {piece!r} (of `{span}`)")
    assert not faults, documents.told(faults)


def texts_of_the_code():
    """Return the texts of the package with what is filled in left out, a line each."""
    found = []
    for file in documents.python_files("gpt3jax"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", "\0") for part in node.values]
                found.append("".join(p if isinstance(p, str) else "\0" for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(node.value)
    return "\n".join(" ".join(text.split()) for text in found)


def page(name):
    (document,) = (d for d in documents.markdown() if d.file.name == name)
    return document


def test_the_readme_is_short_and_shows_a_picture_that_it_describes():
    text = page("README.md").text
    assert len(text.splitlines()) <= 130
    ((description, picture),) = re.findall(r"!\[([^]]+)\]\(([^)]+)\)", text)
    assert len(description.split()) > 10 and (REPOSITORY / picture).is_file()


def test_every_page_can_be_reached_from_the_readme():
    """The site's home is the one page that stands beside the README."""
    reached, waiting = set(), [REPOSITORY / "README.md"]
    while waiting:
        file = waiting.pop()
        if file not in reached:
            reached.add(file)
            links = re.findall(r"\]\(([^):#]+)(?:#[^)]*)?\)", file.read_text())
            for target in ((file.parent / link).resolve() for link in links):
                pages = target.glob("*.md") if target.is_dir() else [target]
                waiting += [page for page in pages if page.is_file() and page.suffix == ".md"]
    pages = set((REPOSITORY / "docs").rglob("*.md")) - {REPOSITORY / "docs" / "index.md"}
    missing = pages - reached
    assert not missing, f"no link leads to {sorted(str(file) for file in missing)}"


def test_the_table_of_recipes_has_the_figures_of_each():
    rows = re.findall(r"(?m)^\| `(configs/[\w/]+\.py)`(.*)$", page("training.md").text)
    names = {str(file.relative_to(REPOSITORY)) for file in documents.python_files("configs")}
    assert {name for name, _ in rows} == names
    for name, row in rows:
        cfg = recipe.load(str(REPOSITORY / name)).model
        shape = f"| {cfg.n_layers} x {cfg.d_model} x {cfg.n_heads} | {cfg.seq_len} |"
        assert shape in row, f"docs/training.md: {name} is {shape}"


def test_the_readme_says_how_far_off_the_plan_was_for_every_published_run():
    table = page("plan.md").text.partition("| run | published s |")[2].partition("\n\n")[0]
    ratios = [row.split("|")[4].strip() for row in table.splitlines()[2:]]
    missing = [ratio for ratio in ratios if ratio not in page("README.md").text]
    assert len(ratios) > 2 and not missing, f"README.md: say {missing}, as docs/plan.md"


def test_the_readme_says_how_far_apart_the_meshes_of_its_picture_are():
    data = json.loads((REPOSITORY / "docs" / "figures" / "data" / "one_loss.json").read_text())
    alone, meshes = np.array(data["one_device"]), np.array(list(data["meshes"].values()))
    difference = np.abs(meshes - alone).max()
    said = f"All {len(meshes)} ways to cut 8 emulated devices were trained beside one device"
    text = " ".join(page("README.md").text.split())
    assert said in text
    assert f"in {len(alone)} steps their losses differ by at most {difference:.7f} nats" in text


def test_the_readme_names_the_versions_that_are_supported():
    """Those of Python 3.11 are the oldest that are allowed, those of 3.12 and 3.13 the newest."""
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    rows = re.findall(r"(?m)^\| Python (3\.\d+)(?:, 3\.\d+)* \| (.*) \|$", page("README.md").text)
    assert [python for python, _ in rows] == ["3.11", "3.12"]
    for name in ("jax", "flax", "numpy"):
        (bounds,) = (d for d in project["dependencies"] if re.match(rf"{name}\b[><=]", d))
        oldest, newest = re.search(r">=([\d.]+)", bounds)[1], re.search(r"<=([\d.]+)", bounds)[1]
        for (_, versions), version in zip(rows, (oldest, newest), strict=True):
            assert f"{name} {version}" in versions.split(", "), f"README.md: {name} {version}"


def test_figures_behind_a_field_are_its_default():
    """As in "`faults.spike_window` (100)"; those with a unit are compared without it."""
    cfg = schema.Config(
        model=schema.Model(n_layers=1, d_model=8, n_heads=1, seq_len=8),
        optimizer=schema.Optimizer(peak_lr=1.0),
        batch=schema.Batch(global_batch_size=1),
        data=schema.Data(),
        train=schema.Train(),
    )
    defaults, found = schema.flatten(cfg), []
    for document in documents.markdown():
        for place, match in document.found(r"`(?:--)?([a-z_]+\.[a-z_-]+)`\s\((\d+)(?: s)?[);]"):
            found.append(float(match[2]))
            assert defaults[match[1].replace("-", "_")] == found[-1], f"{place}: {match[0]}"
    assert len(found) > 8


def test_the_kinds_of_gpus_are_those_that_are_known():
    for document in documents.markdown():
        for place, span in document.spans():
            if re.match(r"h100, ", span):
                assert set(span.split(", ")) == set(gpus.GPUS), f"{place}: {span}"
