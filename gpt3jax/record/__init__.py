"""What a run shows and keeps: the console, metrics.jsonl and TensorBoard."""
