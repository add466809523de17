"""Merge several corpora into one, block by block."""

import dataclasses
import sys

import tqdm

from gpt3jax import errors
from gpt3jax.config import command_line, user_paths
from gpt3jax.data import indexed


@dataclasses.dataclass(frozen=True, kw_only=True)
class Options:
    """The options of `gpt3jax.data.merge`."""

    input: tuple[user_paths.Path, ...]
    """Prefixes of the corpora. Their documents keep this order."""
    output_prefix: user_paths.Path
    """Prefix of the new corpus."""


def main() -> int:
    """Parse the options, merge, print a line about the result; return the exit status."""
    return command_line.run(
        lambda: print(merge(command_line.parse(Options, "data.merge", __doc__)))
    )


def merge(options: Options) -> str:
    """Write the corpora as one, and return a line about it.

    Raises:
        UserError: a corpus is missing or damaged, two have tokens of different types, or the output
            is one of the inputs or cannot be written.
    """
    if not options.input or options.output_prefix in options.input:
        raise errors.UserError(
            "give --input prefixes, and an --output-prefix that is none of them",
            page="data.md#from-text",
        )
    corpora = [indexed.IndexedCorpus(prefix) for prefix in options.input]
    dtype = corpora[0].dtype
    for corpus in corpora:
        if corpus.dtype != dtype:
            raise errors.UserError(
                f"{corpus.prefix} has {corpus.dtype} tokens and {corpora[0].prefix} {dtype}: their "
                "vocabularies differ; prepare both with one vocabulary",
                page="data.md#from-text",
            )
    with indexed.Writer(options.output_prefix, dtype.type) as writer:
        for corpus in tqdm.tqdm(corpora, desc="merging", unit=" corpora"):
            writer.add_corpus(corpus)
    n_tokens = sum(corpus.n_tokens for corpus in corpora)
    return f"{options.output_prefix}: {writer.n_documents:,} documents, {n_tokens:,} tokens"


if __name__ == "__main__":
    sys.exit(main())
