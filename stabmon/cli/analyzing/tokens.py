"""Texts and token ids from files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from stabmon.check.loading import pretrained
from stabmon.check.loading.source import LoadedModel
from stabmon.cli.analyzing.limits import vocabulary_of
from stabmon.tiny.corpus import read_text as read_bytes

TOKENIZER_FILES = ("tokenizer*", "vocab*", "merges.txt", "spiece.model", "*.model", "*.tiktoken")
UNKNOWN = 0.2
"""Share of unknown tokens from which the tokenizer is taken not to know the text."""


@dataclass(frozen=True)
class Text:
    """Token ids, one list per row, and the text of each."""

    rows: list[list[int]]
    words: list[list[str]]
    unit: str
    before: tuple[list[int], list[str]] = field(default_factory=lambda: ([], []))
    """Special tokens before each sample: ids and text."""
    after: tuple[list[int], list[str]] = field(default_factory=lambda: ([], []))
    notes: list[str] = field(default_factory=list)


def read_ids(source: str, wanted: bool) -> Text | None:
    """Read token ids from ``.json``, ``.npy``, ``.pt`` or a text file.

    Args:
        source: the file.
        wanted: True if the user says that the file holds ids; otherwise text files hold none, and a
            ``.json`` that is no list of whole numbers is a text like any other.

    Returns:
        The ids, or None where the file holds no ids.

    Raises:
        ValueError: if the file cannot be read, or holds no row.
    """
    path = Path(source)
    suffix = path.suffix.lower()
    try:
        if suffix == ".npy":
            found: Any = np.load(path, allow_pickle=False).tolist()
        elif suffix == ".pt":
            found = torch.load(path, map_location="cpu", weights_only=True)
            found = _input_ids(found)
            found = found.tolist() if isinstance(found, torch.Tensor) else found
        elif suffix == ".json":
            found = _input_ids(json.loads(path.read_text()))
        elif wanted:
            found = [
                [int(word) for word in line.replace(",", " ").split()]
                for line in path.read_text().splitlines()
                if line.strip()
            ]
        else:
            return None
    except Exception as error:  # of numpy, of pickle, of json: each library has its own
        if suffix == ".json" and not wanted:
            return None
        reason = " ".join(str(error).split())[:120]
        raise ValueError(
            f"{source}: token ids cannot be read ({reason}); give whole numbers as .json, .npy or "
            ".pt"
        ) from None
    rows = found if isinstance(found, list) and found and isinstance(found[0], list) else [found]
    if found == [] or [] in rows:
        raise ValueError(f"{source}: is empty; give at least one token")
    numbers = all(
        isinstance(row, list)
        and all(isinstance(token, int) and not isinstance(token, bool) for token in row)
        for row in rows
    )
    if not numbers:
        if suffix == ".json" and not wanted:
            return None
        raise ValueError(f"{source}: holds no whole numbers; give token ids, one list a sample")
    return Text(rows, [[str(token) for token in row] for row in rows], "tokens")


def _input_ids(stored: Any) -> Any:
    """Return the ``input_ids`` of a tokenizer's output, anything else unchanged."""
    return stored["input_ids"] if isinstance(stored, dict) and "input_ids" in stored else stored


def read_text(source: str, target: LoadedModel) -> Text:
    """Read a text with the tokenizer beside the model, or byte by byte.

    Args:
        source: the file.
        target: the loaded model.

    Returns:
        The text's tokens, in one row.

    Raises:
        ValueError: if the file cannot be read, or is empty.
    """
    raw = read_bytes(source)[1]
    if not raw.strip():
        raise ValueError(f"--text {source}: is empty; give a text")
    tokenizer = _tokenizer(target.tokens_from)
    if tokenizer is None:
        return _bytes(raw, target)
    text = raw.decode(errors="replace")
    with pretrained.quiet():
        ids = list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"])
        around = list(tokenizer("a", verbose=False)["input_ids"])
        inside = list(tokenizer("a", add_special_tokens=False, verbose=False)["input_ids"])
    if not ids:
        raise ValueError(
            f"--text {source}: the model's tokenizer makes no token of it; give another text"
        )
    notes = []
    unknown = getattr(tokenizer, "unk_token_id", None)
    share = ids.count(unknown) / len(ids) if unknown is not None else 0.0
    if share >= UNKNOWN and (matched := _by_vocabulary(text, str(target.tokens_from))) is not None:
        return matched
    if share >= UNKNOWN:
        notes.append(
            f"{share:.0%} of the text's tokens are unknown to the tokenizer beside the model"
        )
    at = next((i for i in range(len(around)) if around[i : i + len(inside)] == inside), 0)
    before, after = (around[:at], around[at + len(inside) :]) if inside else ([], [])
    return Text(
        [ids],
        [written(tokenizer, ids)],
        "tokens",
        (before, written(tokenizer, before)),
        (after, written(tokenizer, after)),
        notes,
    )


def _tokenizer(source: str | None) -> Any:
    """Load the tokenizer beside the model; None if a local folder holds none of its files.

    Without this check transformers 5.23 makes an empty tokenizer for some folders.
    """
    if source is None:
        return None
    folder = Path(source)
    if folder.is_dir() and not any(next(folder.glob(name), None) for name in TOKENIZER_FILES):
        return None
    return pretrained.tokenizer_of(source)


def _by_vocabulary(text: str, source: str) -> Text | None:
    """Split a text by the vocab.txt beside the model; None if that knows too little."""
    path = Path(source) / "vocab.txt"
    if not path.is_file():
        return None
    entries = path.read_text(encoding="utf-8").splitlines()
    vocabulary = {entry: at for at, entry in enumerate(entries) if entry}
    unknown = vocabulary.get("[UNK]", -1)
    ids = longest_matches(text, vocabulary, unknown)
    if not ids or ids.count(unknown) / len(ids) >= UNKNOWN or (unknown < 0 and -1 in ids):
        return None
    around: list[tuple[list[int], list[str]]] = [
        ([vocabulary[name]], [name]) if name in vocabulary else ([], [])
        for name in ("[CLS]", "[SEP]")
    ]
    note = (
        "the tokenizer beside the model does not know the text: it was split into the longest "
        "entries of vocab.txt, blanks left out"
    )
    words = [entries[each] for each in ids]
    return Text([ids], [words], "tokens", around[0], around[1], [note])


def longest_matches(text: str, vocabulary: Mapping[str, int], unknown: int) -> list[int]:
    """Split a text into the longest entries of a vocabulary, without blanks.

    This reads vocabularies whose own splitting rule lies in code beside the model, such as atoms.

    Args:
        text: any text.
        vocabulary: entry -> id.
        unknown: id of a character in no entry.

    Returns:
        Ids, from left to right.

    Example:
        >>> longest_matches("CCl [Na+]", {"C": 1, "l": 2, "Cl": 3, "[Na+]": 4}, unknown=0)
        [1, 3, 4]
    """
    longest = max(map(len, vocabulary), default=1)
    ids, at = [], 0
    while at < len(text):
        if text[at].isspace():
            at += 1
            continue
        sizes = range(min(longest, len(text) - at), 0, -1)
        found = next((size for size in sizes if text[at : at + size] in vocabulary), 0)
        ids.append(vocabulary[text[at : at + found]] if found else unknown)
        at += found or 1
    return ids


def written(tokenizer: Any, ids: Sequence[int]) -> list[str]:
    """Return the text of each token, with the blank before it."""
    if not len(ids):
        return []
    pieces = tokenizer.convert_ids_to_tokens(list(ids))
    parts = any(str(token).startswith("##") for token in tokenizer.get_vocab())
    words = []
    for token, piece in zip(ids, pieces, strict=True):
        piece = str(piece)
        if "▁" in piece:  # SentencePiece, whose blanks decode drops
            words.append(piece.replace("▁", " "))
        elif parts:  # WordPiece, which marks what has no blank before it
            words.append(piece.removeprefix("##") if piece.startswith("##") else f" {piece}")
        else:
            words.append(tokenizer.decode([token]) or piece)
    return words


def _bytes(raw: bytes, target: LoadedModel) -> Text:
    notes = ["no tokenizer was found beside the model: the text was read byte by byte"]
    vocabulary = vocabulary_of(target) or 256
    ids = list(raw)
    if vocabulary < 256:
        ids = [each % vocabulary for each in ids]
        notes.append(f"the model knows {vocabulary} ids: bytes were taken modulo that")
    words = [chr(each) if each < 128 else f"\\x{each:02x}" for each in raw]
    return Text([ids], [words], "bytes", notes=notes)
