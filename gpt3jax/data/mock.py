"""A corpus without files, for benchmarks: Megatron's `--mock-data`.

100,000 documents of random length (about 204.6M tokens); each counts up from 1 and ends with the
end-of-document token. Source: Megatron-LM `MockGPTLowLevelDataset` in `gpt_dataset.py` at
d98e8a64dd.
"""

import numpy as np

SPLIT = "1,1,1"  # data.split has no effect


class MockCorpus:
    """Reads like an `indexed.IndexedCorpus`."""

    prefix = "mock data"

    def __init__(self, vocab_size: int, eod_id: int):
        """Draw the lengths of the documents."""
        self._vocab_size, self._eod_id = vocab_size, eod_id
        self.lengths = np.random.default_rng(0).integers(1, 4096, 100_000, dtype=np.int32)
        self.n_tokens = int(self.lengths.sum())

    def __len__(self) -> int:
        return len(self.lengths)

    def gather(self, sequences: np.ndarray, offsets: np.ndarray, lengths: np.ndarray) -> np.ndarray:
        """Return pieces of documents, as `indexed.IndexedCorpus.gather`, int32."""
        ends = np.cumsum(lengths)
        places = np.arange(lengths.sum()) + np.repeat(offsets - (ends - lengths), lengths)
        last = np.repeat(self.lengths[sequences] - 1, lengths)
        tokens = np.where(places == last, self._eod_id, (places + 1) % self._vocab_size)
        return tokens.astype(np.int32)

    def head(self, n: int) -> np.ndarray:
        """Return the first tokens of the corpus, at most n."""
        documents = np.arange(np.searchsorted(np.cumsum(self.lengths), n) + 1)
        return self.gather(documents, np.zeros_like(documents), self.lengths[documents])[:n]
