"""Checks of machines and processes before a run spends money on them.

`joint` runs them over all processes, from `gpt3jax.main` and from `python -m gpt3jax.preflight`;
`facts` is what a process tells of itself, `checks` what follows from that, `speed` is measured.
"""
