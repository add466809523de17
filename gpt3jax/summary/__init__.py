"""What a run learned, in a few lines: its loss beside simple guesses, a text, what to do next."""
