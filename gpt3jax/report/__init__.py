"""Command: a page, or a summary on the terminal, of a run or of several. Imports no JAX.

It reads what runs keep in log.dir, changes nothing, and may read while a run writes.
"""
