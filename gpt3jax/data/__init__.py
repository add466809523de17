"""From text to batches: corpus files, sample mapping, tokenizer, loading.

Only `loader` touches JAX and Grain; the rest is NumPy.
"""
