"""The rooms of the package are its layers: imports go only down, and no room has a cycle."""

import ast
import graphlib
import re
import subprocess
import sys

import pytest

# From the top. A name is a folder of the package, or a file in its root.
ROOMS = (
    "main", "train", "report", "summary", "evaluate", "sample", "convert", "preflight", "run",
    "plan", "checkpoint", "step", "gradient", "watch", "data", "model", "optimizer", "record",
    "page", "sharding", "distributed", "hardware", "config", "errors",
)  # fmt: skip


def modules(repository):
    """Yield (name, path) of each module; a folder's `__init__` has the folder's name."""
    package = repository / "gpt3jax"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            yield ".".join(parts), path


def imports_of(path):
    """Yield what a file imports from the package: modules, or names where it must not."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt3jax"):
            package = node.module.removeprefix("gpt3jax").lstrip(".")
            for alias in node.names:
                yield f"{package}.{alias.name}".lstrip(".")


def room(module):
    return module.partition(".")[0]


def test_imports_go_only_down(repository):
    paths = dict(modules(repository))
    assert set(ROOMS) == {room(module) for module in paths}
    for module, path in paths.items():
        for imported in imports_of(path):
            if module == "config":  # the names that recipes use
                assert room(imported) == "config"
                continue
            assert imported in paths, f"{path} imports a name, not a module: {imported}"
            if room(imported) != room(module):
                above, below = ROOMS.index(room(module)), ROOMS.index(room(imported))
                assert above < below, f"{module} imports {imported}, whose room is above its own"


def test_no_room_has_a_cycle(repository):
    graph = {
        module: [other for other in imports_of(path) if room(other) == room(module)]
        for module, path in modules(repository)
        if module != "config"
    }
    tuple(graphlib.TopologicalSorter(graph).static_order())  # raises CycleError


WITHOUT_JAX = (
    "errors", "config.recipe", "config.validation", "config.command_line", "config.batch_schedule",
    "hardware.flops", "hardware.xla_flags", "distributed.launchers", "record.recording",
    "record.console", "watch.phases", "checkpoint.metadata", "plan.options", "preflight.options",
    "evaluate.options", "sample.options", "summary.options", "summary.recorded_run",
    "summary.next_commands", "convert.hf_gpt2", "convert.megatron_core", "page.charts",
    "report.html_page",
)  # fmt: skip


def test_what_answers_at_once_imports_no_jax(repository):
    """Nothing that these modules import does either: it takes seconds."""
    code = "import importlib, sys\nfor name in sys.argv[1:]:\n    importlib.import_module(name)\n"
    code += "    assert not {'jax', 'wandb'} & set(sys.modules), name"
    names = [f"gpt3jax.{name}" for name in WITHOUT_JAX]
    done = subprocess.run(
        [sys.executable, "-c", code, *names], cwd=repository, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def libraries(path):
    """Return the libraries that a file imports, inside of functions too."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add((node.module or "").partition(".")[0])
        elif isinstance(node, ast.Call) and ast.unparse(node.func) == "importlib.import_module":
            found.add(getattr(node.args[0], "value", ""))
    return found


@pytest.mark.parametrize(
    ("library", "files"),
    [
        (
            "orbax",
            {f"checkpoint.{name}" for name in ("storage", "partial_reading", "array_blocks")},
        ),
        ("tensorstore", {"checkpoint.array_blocks"}),
        ("grain", {"data.loader"}),
        ("tensorboardX", {"record.tensorboard"}),
        ("wandb", {"record.wandb_run"}),
        ("safetensors", {"convert.tensor_files"}),
        ("torch", {"convert.torch_files"}),
        ("starlette", {"sample.http_server"}),
        ("uvicorn", {"sample.http_server"}),
        ("lm_eval", {"evaluate.lm_eval_model"}),
        ("flax", {"model.gpt", "optimizer", "sharding.layouts"}),
    ],
)
def test_a_library_stays_behind_its_files(repository, library, files):
    assert {name for name, path in modules(repository) if library in libraries(path)} == files


def private_modules(path):
    """Return the private modules of JAX that a file imports or reaches: `jax._src.NAME`."""
    names = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names += [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Attribute):
            names.append(ast.unparse(node))
    return {match[0] for name in names if (match := re.match(r"jax\._\w+\.\w+", name))}


def test_private_modules_of_jax_are_those_that_the_document_lists(repository):
    text = (repository / "docs" / "architecture.md").read_text()
    listed = set(re.findall(r"(?m)^\| `(jax\._\S+)` \| `(\S+)` \|", text))
    package = repository / "gpt3jax"
    used = {
        (name, path.relative_to(package).as_posix())
        for path in package.rglob("*.py")
        for name in private_modules(path)
    }
    message = "docs/architecture.md must list each private module and file, and no other"
    assert used == listed, message


AXES = ("copies", "data", "stage", "fsdp", "context", "tensor")


def test_mesh_axes_are_named_where_arrays_are_laid_out_alone(repository):
    """Elsewhere an axis is named to ask for its size: `shape["stage"]`."""
    allowed = {"gradient.pipeline": {"stage"}, "checkpoint.layer_stacking": {"stage"}}
    allowed |= {"config.layout": set(AXES)}  # the fields of config.mesh
    for module, path in modules(repository):
        if room(module) in ("sharding", "plan", "evaluate", "sample"):
            continue  # the last three reckon with axes; "data" is an option, and a key of JSON
        tree = ast.parse(path.read_text())
        sizes = {id(n.slice) for n in ast.walk(tree) if isinstance(n, ast.Subscript)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in AXES and id(node) not in sizes:
                where = f"{path}:{node.lineno} names the mesh axis {node.value!r}"
                assert node.value in allowed.get(module, ()), f"{where}: let sharding do it"


def functions(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.FunctionDef):
            yield node


def test_functions_stay_short(repository):
    for module, path in modules(repository):
        for node in functions(path):
            n_lines = node.end_lineno - node.lineno + 1
            assert n_lines <= (90 if module == "train" else 60), f"{module}.{node.name}"
