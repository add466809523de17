"""The text of one generated row as it grows, up to a stop string, the end of text or its limit."""

from collections.abc import Sequence

from gpt3jax.data import tokenizer as tokenization
from gpt3jax.sample import generate


class GeneratedText:
    """Turns a row's tokens into text that can be shown at once.

    Attributes:
        tokens: the row's tokens so far, including those that ended it (a stop string's, or the
            end-of-text token).
        offsets: where each token's text begins (characters after the prompt).
        reason: why the text ended, "stop" or "length"; empty while it grows.
    """

    def __init__(
        self,
        tokenizer: tokenization.Tokenizer,
        prompt: Sequence[int],
        limit: int,
        stops: Sequence[str] = (),
        *,
        ignore_eod: bool = False,
    ):
        """Begin after a prompt.

        The text ends before the first of `stops`, with the end-of-text token, or after `limit`
        tokens.
        """
        self.tokens: list[int] = []
        self.offsets: list[int] = []
        self.reason = "" if limit else "length"
        self._stream, self._limit = tokenization.TextStream(tokenizer, prompt), limit
        self._stops = stops
        self._eod_id = -1 if ignore_eod else tokenizer.eod_id
        self._n_decoded = 0
        self._held = ""  # may be the beginning of a stop string

    def add(self, tokens: Sequence[int]) -> str:
        """Return what the tokens add to the text; those after its end add nothing."""
        return "".join([self._add(token) for token in tokens if not self.reason])

    def _add(self, token: int) -> str:
        self.tokens.append(token)
        self.offsets.append(self._n_decoded)
        ended, full = token == self._eod_id, len(self.tokens) == self._limit
        new = "" if ended else self._stream.add([token])
        new += self._stream.end() if ended or full else ""
        self._n_decoded += len(new)
        new = self._held + new
        places = [new.find(stop) for stop in self._stops if stop in new]
        if places or ended or full:
            self.reason = "stop" if places or ended else "length"
            return new[: min(places)] if places else new
        n_held = max((_n_begun(new, stop) for stop in self._stops), default=0)
        self._held = new[len(new) - n_held :]
        return new[: len(new) - n_held]


def begin(
    generator: generate.Generator,
    tokenizer: tokenization.Tokenizer,
    row: generate.Row,
    stops: Sequence[str] = (),
) -> GeneratedText:
    """Return the text of a row that is about to be generated."""
    limit = generator.limit(row.prompt, row.options)
    return GeneratedText(tokenizer, row.prompt, limit, stops, ignore_eod=row.options.ignore_eod)


def offsets(tokenizer: tokenization.Tokenizer, ids: Sequence[int]) -> list[int]:
    """Return where the text of each of these tokens begins (characters)."""
    text = GeneratedText(tokenizer, (), len(ids), ignore_eod=True)
    text.add(ids)
    return text.offsets


def _n_begun(text: str, stop: str) -> int:
    """Return how many characters at the end of a text may be the beginning of a stop string."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if text.endswith(stop[:n])), 0)
