"""Weights in and out: other projects' formats from and to checkpoints."""
