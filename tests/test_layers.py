"""Imports go only down: docs/architecture.md has the layers, this holds the code to them."""

import ast
import re

from gpt3jax import sharding

LAYERS = [
    [
        "main",
        "sample.__main__",
        "evaluate.__main__",
        "plan.__main__",
        "preflight.__main__",
        "convert.__main__",
        "checkpoint.__main__",
        "data.prepare",
        "data.inspect",
        "data.merge",
    ],
    ["evaluate.measuring", "plan.planning", "preflight.rounds"],
    ["evaluate.lm_eval_model"],
    ["evaluate.scoring"],
    ["sample.serve"],
    ["sample.completions", "sample.megatron"],
    ["sample.job"],
    ["sample.batcher", "sample.row_text"],
    ["sample.generate"],
    ["sample.decoding"],
    ["plan.page", "plan.terminal"],
    ["plan.report", "plan.rows", "plan.search"],
    ["plan.legible"],
    ["plan.compiler", "plan.time_model"],
    ["plan.buffers", "plan.timeline"],
    ["train", "replay", "convert.megatron"],
    ["saving"],
    ["preflight.joint", "preflight.report"],
    ["preflight.checks", "oversight"],
    ["watchdog", "goodput"],
    ["peers"],
    ["preflight.facts"],
    ["setup", "trained", "preflight.program", "preflight.speed", "checkpoint.listing"],
    ["resuming"],
    ["step_log", "step", "checkpoint.checkpoints", "replicas"],
    ["array_blocks", "stacking", "faults", "checkpoint.keeping", "holding"],
    ["pipeline"],
    [
        "convert.hf_gpt2",
        "convert.torch_files",
        "convert.hf_tokenizer",
        "metrics",
        "model",
        "loss",
        "optimizer",
        "data.loader",
        "stopping",
        "profiling",
    ],
    ["plan.memory_model"],
    ["attention", "lookup", "remat", "sample.sampling", "data.splits", "evaluate.options"],
    ["data.text", "data.blend", "evaluate.stream"],
    ["data.samples", "data.tokenizer", "dropout", "zigzag", "skipping"],
    [
        "data.indexed",
        "data.index_cache",
        "data.documents",
        "data.tokenizer_files",
        "data.mock",
        "sharding",
        "flops",
        "distributed",
        "phases",
        "plan.hlo",
        "xla_flags",
        "convert.mcore",
        "convert.tensor_files",
    ],
    ["gpus", "microbatches", "launchers", "devices", "console"],
    ["plan.options"],
    ["recipe", "command", "sample.text_options"],
    ["validation", "paths"],
    ["batch_schedule", "checkpoint.metadata", "preflight.options"],
    ["config"],
    ["ranges"],
]
LEVEL = {module: len(LAYERS) - i for i, layer in enumerate(LAYERS) for module in layer}


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("gpt3jax"):
            package = node.module.removeprefix("gpt3jax").lstrip(".")
            for alias in node.names:
                yield f"{package}.{alias.name}".lstrip(".")


def modules(repository):
    package = repository / "gpt3jax"
    for path in sorted(package.rglob("*.py")):
        parts = path.relative_to(package).with_suffix("").parts
        parts = parts[:-1] if parts[-1] == "__init__" else parts
        if parts:
            yield ".".join(parts), path


def test_imports_go_only_down(repository):
    for module, path in modules(repository):
        for imported in imports_of(path):
            if imported != "data":
                assert imported in LEVEL, f"{path} imports a name, not a module: {imported}"
                assert LEVEL[imported] < LEVEL[module], f"{module} imports {imported}"


def test_config_and_metrics_do_without_jax(repository):
    names = ("config", "ranges", "recipe", "validation", "command", "batch_schedule", "paths")
    for name in (*names, "metrics", "flops", "gpus", "phases", "launchers", "console"):
        assert "import jax" not in (repository / "gpt3jax" / f"{name}.py").read_text()


def test_orbax_grain_and_nnx_stay_behind_their_files(repository):
    allowed = {"orbax": {"checkpoint.checkpoints", "array_blocks"}, "tensorstore": {"array_blocks"}}
    allowed |= {"grain": {"data.loader"}, "tensorboardX": {"metrics"}}
    allowed |= {"safetensors": {"convert.tensor_files"}, "torch": {"convert.torch_files"}}
    allowed |= {"starlette": {"sample.serve"}, "uvicorn": {"sample.serve"}}
    allowed |= {"lm_eval": {"evaluate.lm_eval_model"}}
    for module, path in modules(repository):
        text = path.read_text()
        for library, files in allowed.items():
            if re.search(rf"\b(import|from) {library}\b", text):
                assert module in files, f"{module} imports {library}"


def table_of_layers(repository):
    """Return (file, row) of the table in docs/architecture.md, from the top."""
    text = (repository / "docs" / "architecture.md").read_text()
    rows = re.findall(r"(?m)^\| \w* ?\|(.*)\|$", text.partition("Beside the package")[0])
    return [(file, row) for row in rows for file in re.findall(r"`(\S+\.py)`", row.split("|")[0])]


def module_named(file):
    return file.removesuffix(".py").replace("/", ".").removesuffix(".__init__")


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


def test_the_table_of_layers_has_every_file_above_those_it_imports(repository):
    place = {module_named(file): i for i, (file, _) in enumerate(table_of_layers(repository))}
    with_code = {module: path for module, path in modules(repository) if list(libraries(path))}
    lacking = with_code.keys() - place.keys()
    assert not lacking, f"the table of docs/architecture.md lacks {lacking}"
    for module, path in with_code.items():
        for imported in set(imports_of(path)) - {"data"}:
            told = f"docs/architecture.md has {module} below {imported}, which it imports"
            assert place[module] < place[imported], told


def test_what_the_table_of_layers_says_of_imports_is_so(repository):
    """It says "imports no JAX", "the only file that imports ..."; "the only other file" of two."""
    package, n_checked = repository / "gpt3jax", 0
    for file, row in table_of_layers(repository):
        if re.search(r"imports? no JAX", row):
            n_checked += 1
            assert not libraries(package / file) & {"jax", "flax", "optax", "orbax"}, file
        for other, names in re.findall(r"only (other )?(?:file|one) that imports ([^;,|]+)", row):
            for name in re.sub(r"\bit\b", "lm_eval", names).strip().split(" and "):
                n_checked += 1
                using = {
                    path.relative_to(package).as_posix()
                    for path in package.rglob("*.py")
                    if name.strip().lower() in libraries(path)
                }
                assert file in using and len(using) == (2 if other else 1), (name, using)
    assert n_checked > 15


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
    told = "docs/architecture.md, Private modules of JAX: a row for each module and file, no other"
    assert used == listed, told


def test_mesh_axes_are_named_where_arrays_are_laid_out_alone(repository):
    """Elsewhere an axis is named to ask for its size: `shape["stage"]`."""
    allowed = {"sharding": set(sharding.AXES), "pipeline": {"stage"}, "stacking": {"stage"}}
    allowed |= {"validation": set(sharding.AXES)}  # the fields of config.mesh
    for module, path in modules(repository):
        if module.startswith(("plan.", "evaluate.", "sample.")):
            continue  # they reckon with axes; "data" is an option, and a key of JSON
        tree = ast.parse(path.read_text())
        sizes = {id(n.slice) for n in ast.walk(tree) if isinstance(n, ast.Subscript)}
        for node in ast.walk(tree):
            if isinstance(node, ast.Constant) and node.value in sharding.AXES:
                told = (
                    f"{path}:{node.lineno} names the mesh axis {node.value!r}: let sharding do it"
                )
                assert id(node) in sizes or node.value in allowed.get(module, set()), told


def test_functions_stay_short_and_the_path_to_the_gradient_too(repository):
    for module, path in modules(repository):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                assert n_lines <= (90 if module == "train" else 60), f"{module}.{node.name}"
    files = ("main", "train", "step", "loss", "model")
    n = sum(len((repository / "gpt3jax" / f"{f}.py").read_text().splitlines()) for f in files)
    assert n < 1000, n
