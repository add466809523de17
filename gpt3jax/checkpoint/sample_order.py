"""The keys under which a checkpoint stores what decides the order of samples. Imports no JAX.

`data.splits` writes these keys. Checkpoints of gpt3jax 0.1.0 have sentences in their place, which
`with_keys` replaces, so that old and new checkpoints compare equal.
"""

from collections.abc import Mapping

WORDS = {
    "corpora": "corpus",
    "tokens": "tokens",
    "weights": "blend weights",
    "split": "data.split",
    "seq_len": "model.seq_len",
    "seed": "train.seed",
    "n_epochs": "epochs (from the length of the run)",
    "last_epoch_apart": "last epoch shuffled apart",
}
"""What users read in place of each key: a field of the config, where there is one."""

_KEYS_OF_0_1 = {
    "corpus": "corpora",
    "blend weights": "weights",
    "data.split": "split",
    "model.seq_len": "seq_len",
    "train.seed": "seed",
    "epochs (from the length of the run)": "n_epochs",
    "last epoch shuffled apart": "last_epoch_apart",
}


def with_keys(stored: Mapping[str, object]) -> dict[str, object]:
    """Return the order of samples that a checkpoint of any version stores, under today's keys."""
    return {_KEYS_OF_0_1.get(key, key): value for key, value in stored.items()}


def in_words(order: Mapping[str, object]) -> dict[str, object]:
    """Return an order of samples under the words that users read."""
    return {WORDS.get(key, key): value for key, value in order.items()}
