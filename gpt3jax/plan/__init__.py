"""Planning a run on GPUs that are not here: memory, collectives, time and cost.

`memory_model` and `time_model` are closed forms, and answer at once; `compiler` compiles the true
step, which `hlo`, `timeline` and `buffers` read. `search` looks for the best layout.
"""
