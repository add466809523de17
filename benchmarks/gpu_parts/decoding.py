"""Greedy text of the golden GPT-2, by `gpt3jax.sample`'s generator, beside Hugging Face's own."""

import jax
import numpy as np

from gpt3jax.checkpoint import parameters
from gpt3jax.config import schema
from gpt3jax.convert import __main__ as convert
from gpt3jax.distributed import joining
from gpt3jax.sample import generate, sampling_options
from gpt3jax.sharding import meshes

import numpy_gpt

GREEDY = sampling_options.Options(max_new_tokens=30, temperature=0.0, ignore_eod=True)


def compare(task):
    """Yield how many of the 90 tokens differ: none may at full precision."""
    joining.start(schema.Distributed(), schema.Mesh(cpu_devices=1 if task.tiny else 0))
    source = numpy_gpt.GOLDEN / "hf_gpt2"
    convert.from_hf(convert.FromHf(folder=str(source), output=str(task.folder / "checkpoint")))
    golden = np.load(source / "golden.npz")
    for dtype, precision in (("float32", "highest"), ("float32", "default"), ("bfloat16", None)):
        with jax.default_matmul_precision(precision):
            n_different = differences(str(task.folder / "checkpoint"), dtype, golden)
        limit = {"limit": 0} if precision == "highest" else {}
        yield {f"{dtype} {precision or ''}".strip(): {"error": n_different, "of": 90, **limit}}


def differences(checkpoint, dtype, golden):
    """Return how many tokens differ from the first that does on; the margins are small."""
    source = parameters.open_newest(checkpoint, meshes.make_mesh(schema.Mesh()), dtype)
    generator = generate.Generator(
        source.params(), source.program.compute, source.program.mesh, eod_id=256
    )
    prompts = [golden[f"prompt{i}"].ravel().tolist() for i in range(3)]
    rows = [generate.Row(prompt=p, options=GREEDY, number=0) for p in prompts]
    texts = [list(prompt) for prompt in prompts]
    for step in generator.stream(rows):
        for text, tokens in zip(texts, step, strict=True):
            text.extend(tokens)
    return sum(
        int((np.asarray(text) != golden[f"generated{i}"].ravel()).sum())
        for i, text in enumerate(texts)
    )
