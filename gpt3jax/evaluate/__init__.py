"""Measuring a checkpoint: its loss on a text or a corpus, and the tasks of lm-eval."""
