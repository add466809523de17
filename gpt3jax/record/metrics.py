"""What each value means that a run records, with its unit. docs/reference/metrics.md shows it."""

FILE = "metrics.jsonl"
STEP = {
    "step": "Number of steps that the run has taken.",
    "time": "When the entry was written (seconds since 1970, UTC).",
    "consumed_samples": "Samples that the run has consumed, skipped ones included.",
    "consumed_tokens": "Tokens that the run has consumed.",
    "batch_size": "Samples in the batch of this step.",
    "learning_rate": "Learning rate of this step.",
    "loss": "Mean loss of the tokens in this step (nats).",
    "grad_norm": "Global L2 norm of this step's gradient, before clipping.",
    "loss_scale": "Loss scale of this step; always 1 except in float16.",
    "interval_loss": "Mean loss of the steps since the last entry, without skipped ones (nats).",
    "step_time": "Mean time of a step since the last entry (seconds). Compiling, restoring, "
    "evaluating and saving are left out.",
    "skipped": "1 if this step was skipped: its gradient or loss was faulty, and no weight "
    "changed. Otherwise 0.",
    "skipped_in_interval": "Skipped steps since the last entry.",
    "nan_in_interval": "Steps since the last entry whose loss was not finite.",
    "skipped_samples": "Samples of the run that changed no weight: those of skipped steps, and "
    "those that `data.skip_samples` leaves out.",
    "spikes_in_interval": "Steps since the last entry whose loss was a spike (see `faults.spike`).",
    "tokens_per_second": "Tokens a second on all devices, from `step_time`.",
    "tokens_per_second_per_device": "Tokens a second on one device.",
    "tflops_per_device": "Speed of one device, from Megatron's formula for the operations of a "
    "step (TFLOP/s).",
    "mfu": "Model FLOPs utilization: the speed as a share of the device's peak (0 to 1), which "
    "is that of 8 bits for `precision.matmul_dtype=float8`. It is left out where the peak is not "
    "known (see `log.peak_tflops`).",
}
"""The entry of a logged step in metrics.jsonl."""
EVALUATION = {
    "validation_loss": "Mean loss of the validation split's tokens (nats).",
    "validation_ppl": "Perplexity of the validation split: exp(loss), at most exp(20).",
    "test_loss": "Mean loss of the test split's tokens, at the end of the run (nats).",
    "test_ppl": "Perplexity of the test split: exp(loss), at most exp(20).",
}
"""The entry of an evaluation in metrics.jsonl, besides `step`, `time` and `consumed_samples`."""
TENSORBOARD = {
    "n_devices": "Number of devices.",
    "bytes_in_use": "Memory in use on the first device of process 0 (bytes).",
    "peak_bytes_in_use": "Highest memory in use on that device so far (bytes).",
}
"""Values for TensorBoard alone; those of memory have JAX's names."""
