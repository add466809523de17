"""GPUs and networks: which devices JAX uses, what they can do, and XLA's options for them."""
