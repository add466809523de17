"""What a run does besides its steps: starting, saving, logging, faults, stopping."""
