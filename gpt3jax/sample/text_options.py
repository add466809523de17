"""How a text is sampled, as the command line or a request asks for it. Imports no JAX."""

import dataclasses
from typing import Annotated

from gpt3jax.config import ranges, validation


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """How the text of one row is chosen, and where it ends."""

    max_new_tokens: ranges.Count = 128
    """Length of the text at most (tokens); it also ends where the model's context is full."""
    temperature: Annotated[float, ranges.Range(0, 100)] = 1.0
    """Divides the logits: below 1 bolder, above 1 more varied; 0 always takes the likeliest."""
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
            UserError: it names the field, the value and the range.
        """
        validation.check_ranges(self)
