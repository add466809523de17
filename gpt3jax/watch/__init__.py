"""One clock for each process, and what reads it: watchdog, goodput, stragglers."""
