"""Checks of machines and processes before a run spends money on them.

`joint` runs them over all processes, for training and for `python -m gpt3jax.preflight`. `facts`
has what a process reports about itself, `checks` compares the reports, `speed` measures.
"""
