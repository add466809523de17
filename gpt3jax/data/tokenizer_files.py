"""The files of a tokenizer: which are in a folder, whether they agree, and their copies.

`tokenizer_sources` makes tokenizers of them; here they are only compared and copied.
"""

import dataclasses
import pathlib
import shutil
from collections.abc import Mapping
from typing import Any, TypeAlias

from gpt3jax import errors
from gpt3jax.config import schema, user_paths

_PAGE = "data.md#when-data-is-refused"
TOKENIZER, VOCAB, MERGES = "tokenizer.json", "vocab.json", "merges.txt"
CONFIG = "tokenizer_config.json"
_SPECIAL = "special_tokens_map.json"
_ADDED = "added_tokens.json"
# The files that save_pretrained of transformers may write for a tokenizer.
_NAMES = (TOKENIZER, VOCAB, MERGES, CONFIG, _SPECIAL, _ADDED, "chat_template.jinja")
Fields: TypeAlias = dict[str, Any]  # of `config.Data`, as arguments
_Json: TypeAlias = dict[str, Any]  # read from outside


def read_text(path: str) -> str:
    """Return the text of one of GPT-2's two files.

    Raises:
        UserError: the file is missing, or not UTF-8.
    """
    if not pathlib.Path(path).is_file():
        raise errors.UserError(
            f"{path}: no such file (GPT-2's vocab.json and merges.txt)", page=_PAGE
        )
    try:
        return pathlib.Path(path).read_bytes().decode()
    except (OSError, UnicodeDecodeError) as error:
        raise errors.UserError(f"{path}: {error}", page=_PAGE) from error


def read_merges(path: str) -> list[tuple[str, str]]:
    """Return the merges of a `merges.txt`.

    Raises:
        UserError: as `read_text`, or a line is not a merge; the message names the line.
    """
    merges = []
    for number, line in enumerate(read_text(path).split("\n"), 1):
        line = line.removesuffix("\r")
        if line.startswith("#version") or not line:
            continue
        left, _, right = line.partition(" ")
        if not right or " " in right:
            raise errors.UserError(
                f"{path}:{number}: {line!r} is not a merge: two tokens and a space between them",
                page=_PAGE,
            )
        merges.append((left, right))
    return merges


def find(folder: pathlib.Path) -> Fields:
    """Return the fields of `config.Data` that name the tokenizer of a folder; {} if it has none.

    `tokenizer.json` is preferred to GPT-2's two files, which lack the tokens that it adds.
    """
    if (folder / TOKENIZER).is_file():
        return {"tokenizer": str(folder / TOKENIZER)}
    if all(pathlib.Path(file).is_file() for file in pair(folder)):
        return dict(zip(("vocab_file", "merge_file"), pair(folder), strict=True))
    return {}


def moved(data: schema.Data, folder: pathlib.Path) -> schema.Data:
    """Return a config whose missing tokenizer files are replaced by those of the folder.

    Files of the same name replace them, so a checkpoint's folder that has them may be moved.
    """
    names = ("tokenizer", "vocab_file", "merge_file")
    here = {name: folder / pathlib.Path(getattr(data, name)).name for name in names}
    gone: Fields = {
        name: str(path)
        for name, path in here.items()
        if path.is_file() and not pathlib.Path(getattr(data, name)).is_file()
    }
    return dataclasses.replace(data, **gone)


def pair(folder: pathlib.Path) -> tuple[str, str]:
    """Return the paths of GPT-2's two files in a folder."""
    return str(folder / VOCAB), str(folder / MERGES)


def copy_folder(source: pathlib.Path, target: pathlib.Path) -> Fields:
    """Copy all tokenizer files of a folder, unchanged; return `find` of the copies."""
    for name in _NAMES:
        if (source / name).is_file():
            shutil.copyfile(source / name, target / name)
    return find(target)


def copy_files(named: Mapping[str, str], target: pathlib.Path) -> None:
    """Copy the files that fields of `config.Data` name, to the names that `find` looks for."""
    names = {"tokenizer": TOKENIZER, "vocab_file": VOCAB, "merge_file": MERGES}
    for field, file in named.items():
        shutil.copyfile(file, target / names[field])


def check(folder: pathlib.Path, vocab: Mapping[str, int]) -> None:
    """Check that the files of a folder agree with the tokenizer that was read from it.

    Args:
        folder: the folder.
        vocab: all tokens of that tokenizer, added ones included, and their ids.

    Raises:
        UserError: another file has different tokens or merges; the message names both files.
    """
    for name, added in ((_ADDED, _read(folder / _ADDED)), (CONFIG, _decoder(folder))):
        for token, number in added.items():
            if vocab.get(token) != number:
                raise errors.UserError(
                    f"{folder / name} adds the token {token!r} as {number}, which the tokenizer "
                    f"there does not: write a whole {TOKENIZER}, as AutoTokenizer"
                    f".from_pretrained({str(folder)!r}).save_pretrained(...) of transformers does",
                    page=_PAGE,
                )
    if (folder / TOKENIZER).is_file():
        _check_pair(folder, vocab)


def special_ids(folder: pathlib.Path, vocab: Mapping[str, int]) -> dict[str, int]:
    """Return the ids of the tokens that a folder names `bos_token`, `eos_token` or `pad_token`."""
    named = _read(folder / _SPECIAL) | _read(folder / CONFIG)
    ids = {}
    for name in ("bos_token", "eos_token", "pad_token"):
        token = named.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if isinstance(token, str) and token in vocab:
            ids[name] = vocab[token]
    return ids


def _check_pair(folder: pathlib.Path, vocab: Mapping[str, int]) -> None:
    """Check that GPT-2's two files beside a `tokenizer.json` have its tokens and merges."""
    words = _read(folder / VOCAB)
    differ = [VOCAB] if any(vocab.get(word) != number for word, number in words.items()) else []
    if (folder / MERGES).is_file():
        merges = _read(folder / TOKENIZER).get("model", {}).get("merges", [])
        pairs = [tuple(m.split(" ") if isinstance(m, str) else m) for m in merges]
        differ += [MERGES] if pairs != read_merges(str(folder / MERGES)) else []
    if differ:
        raise errors.UserError(
            f"{folder / differ[0]} is not of the same tokenizer as {TOKENIZER} beside it: remove "
            "the one that the model was not trained with",
            page=_PAGE,
        )


def _decoder(folder: pathlib.Path) -> dict[str, int]:
    """Return the tokens that a `tokenizer_config.json` adds."""
    entries = _read(folder / CONFIG).get("added_tokens_decoder") or {}
    return {entry["content"]: int(number) for number, entry in entries.items()}


def _read(path: pathlib.Path) -> _Json:
    """Return the object in a JSON file, an empty one where there is no file."""
    return user_paths.read_json(path, _PAGE) if path.is_file() else {}
