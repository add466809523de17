"""The text of one generated row as it grows, up to a stop string or the end of text."""

from gpt3jax.data import tokenizer


class RowText:
    """Turns a row's tokens into text that can be shown at once.

    Attributes:
        tokens: the row's tokens so far, the end-of-text token included.
        reason: why it ended, "stop" or "length"; empty before.
    """

    def __init__(
        self, text: tokenizer.Tokenizer, stops: tuple[str, ...] = (), ignore_eod: bool = False
    ):
        """Begin; the text ends before the first of `stops`, or with the end-of-text token."""
        self.tokens: list[int] = []
        self.reason = ""
        self._stream, self._stops = tokenizer.TextStream(text), stops
        self._eod_id = -1 if ignore_eod else text.eod_id
        self._held = ""  # may be the beginning of a stop string

    def add(self, tokens: list[int]) -> str:
        """Return what the tokens add to the text."""
        if self.reason:
            return ""
        self.tokens += tokens
        ended = tokens[-1:] == [self._eod_id]
        new = self._held + self._stream.add(tokens[:-1] if ended else tokens)
        new += self._stream.end() if ended else ""
        places = [new.find(stop) for stop in self._stops if stop in new]
        if places or ended:
            self.reason, self._held = "stop", ""
            return new[: min(places)] if places else new
        lengths = [n for s in self._stops for n in range(1, len(s)) if new.endswith(s[:n])]
        n_told = len(new) - max(lengths, default=0)
        self._held = new[n_told:]
        return new[:n_told]

    def end(self) -> str:
        """Return what was held back, where nothing but its length ended the text."""
        if self.reason:
            return ""
        self.reason = "length"
        return self._held + self._stream.end()
