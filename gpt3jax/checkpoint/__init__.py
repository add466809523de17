"""Checkpoints: saved and restored, listed and looked into; the command imports no JAX to list."""
