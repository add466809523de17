"""What a run shows and keeps: the console, metrics.jsonl, TensorBoard, Weights & Biases."""
