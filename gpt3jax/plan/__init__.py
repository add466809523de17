"""What a config takes on GPUs that are not here: memory, collectives, time, cost.

`memory_model` and `time_model` are closed forms, at once; `compiler` compiles the true step.
"""
