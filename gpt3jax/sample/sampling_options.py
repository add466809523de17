"""How a text is sampled, as the command line or a request asks for it. Imports no JAX."""

import dataclasses
from typing import Annotated

from gpt3jax.config import ranges, validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the tokens of one row are chosen, and where its text ends."""

    max_new_tokens: ranges.Count = 128
    """Greatest length of the text (tokens); it also ends where the model's context is full."""
    temperature: Annotated[float, ranges.Range(0, 100)] = 1.0
    """Divides the logits: text is more predictable below 1, more varied above 1; 0 always chooses
    the likeliest token."""
    top_k: ranges.Count = 0
    """Choose among this many likeliest tokens (0: among all)."""
    top_p: Annotated[float, ranges.Range(0, 1, excluded=0)] = 1.0
    """Then choose among the likeliest tokens that together reach this probability (1: all)."""
    seed: ranges.Seed = 0
    """Decides every random choice."""
    ignore_eod: bool = False
    """Go on after the end-of-text token."""

    def check(self) -> None:
        """Check the ranges.

        Raises:
            UserError: a value is out of its range; the message names the field.
        """
        validation.check_ranges(self)
