"""From text to batches: corpora, the order of samples, tokenizers, and loading.

`loader` and `global_batch` alone use JAX, `loader` alone Grain; the rest is NumPy. From the top:
`loader`, `splits`, `blend`, `samples`, `indexed`. The commands are `prepare`, `merge`, `inspect`.
"""
