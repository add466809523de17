"""Imports go only down: docs/architecture.md has the layers, this holds the code to them."""

import ast
import re

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


def test_functions_stay_short_and_the_path_to_the_gradient_too(repository):
    for module, path in modules(repository):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef):
                n_lines = node.end_lineno - node.lineno + 1
                assert n_lines <= (90 if module == "train" else 60), f"{module}.{node.name}"
    files = ("main", "train", "step", "loss", "model")
    n = sum(len((repository / "gpt3jax" / f"{f}.py").read_text().splitlines()) for f in files)
    assert n < 1000, n
