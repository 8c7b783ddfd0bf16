"""Inputs of an analysis: stretches of a text, token ids, or images."""

from __future__ import annotations

import inspect
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabmon.check.loading.source import LoadedModel
from stabmon.cli.analyzing.images import image_files, read_images
from stabmon.cli.analyzing.limits import most_positions, reads_tokens, vocabulary_of
from stabmon.cli.analyzing.options import AnalyzeOptions
from stabmon.cli.analyzing.tokens import Text, read_ids, read_text

DEFAULT_LENGTH = 256
"""Default number of tokens per sample."""


@dataclass(frozen=True, eq=False)
class Inputs:
    """A batch and its description."""

    batch: Any
    samples: int
    length: int
    """Tokens of the longest sample; 0 for images and for the callable's own sample."""
    described: str
    lengths: tuple[int, ...] = ()
    """Tokens of each sample without padding."""
    positions: int | None = None
    """Number of learned positions, which the model cannot exceed; None without."""
    tokens: list[list[str]] | None = None
    images: np.ndarray | None = None
    """``[B, height, width, 3]`` uint8, as the model sees them."""
    notes: list[str] = field(default_factory=list)


def make_inputs(target: LoadedModel, options: AnalyzeOptions) -> Inputs:
    """Read the user's input and make a batch of it.

    Args:
        target: the loaded model.
        options: of the command.

    Returns:
        The batch and its description.

    Raises:
        ValueError: in one line, for input that is missing, empty, too short, out of range, or of a
            kind that the model does not take.
    """
    main = getattr(target.model, "main_input_name", None)
    source = options.text or options.ids
    if target.sample is not None and source is None:
        return _own_sample(target.sample)
    if main == "pixel_values":
        return _from_images(target, options)
    if main not in (None, "input_ids"):
        raise ValueError(
            f"{type(target.model).__name__} reads {main}, which this command cannot make: use the "
            "functions of stabmon.analysis"
        )
    if source is None:
        raise ValueError("nothing to analyse: give --text FILE, or --ids FILE with token ids")
    if not Path(source).exists():
        raise ValueError(
            f"{'--text' if options.text else '--ids'} {source}: no such file; give a text file, "
            "or token ids as .json, .npy or .pt"
        )
    if Path(source).is_dir():
        raise ValueError(
            f"--text {source}: is a folder, and {type(target.model).__name__} reads tokens; give "
            "a text file"
        )
    if not reads_tokens(target):
        raise ValueError(
            f"{type(target.model).__name__}: takes no token ids; let the callable return (model, "
            "sample)"
        )
    if not Path(source).stat().st_size:
        raise ValueError(f"{source}: is empty; give a text, or token ids")
    text = read_ids(source, options.ids is not None)
    if text is None:
        if options.ids is not None:
            raise ValueError(
                f"--ids {source}: holds no token ids; give lists of whole numbers as .json, .npy, "
                ".pt or .txt"
            )
        text = read_text(source, target)
    _check_range(text, vocabulary_of(target), source)
    return _from_tokens(target, options, text, source)


def _check_range(text: Text, vocabulary: int | None, source: str) -> None:
    if vocabulary is None:
        return
    for row in text.rows:
        bad = [token for token in row if not 0 <= token < vocabulary]
        if bad:
            raise ValueError(
                f"{source}: token id {bad[0]} is out of range, the model knows 0 to "
                f"{vocabulary - 1}; give ids of its own tokenizer"
            )


def _own_sample(sample: Any) -> Inputs:
    batch = sample if isinstance(sample, dict | tuple | list) else (sample,)
    tensors = [
        each
        for each in (batch.values() if isinstance(batch, dict) else batch)
        if isinstance(each, Tensor)
    ]
    if not tensors or not tensors[0].numel():
        raise ValueError(
            "the callable's own sample holds no tensor, or an empty one; give --text FILE"
        )
    return Inputs(batch, len(tensors[0]), 0, "the callable's own sample", notes=[])


def _from_images(target: LoadedModel, options: AnalyzeOptions) -> Inputs:
    kind = type(target.model).__name__
    if options.ids is not None:
        raise ValueError(
            f"--ids {options.ids}: {kind} reads images; give --text FOLDER with images"
        )
    if options.text is None:
        raise ValueError(f"nothing to analyse: {kind} reads images; give --text FOLDER with images")
    if options.length is not None:
        raise ValueError(f"--length does not apply to {kind}, which reads images of one size")
    files = image_files(options.text, kind)
    chosen = files[: options.samples or 8]
    notes = (
        []
        if len(chosen) == len(files) or options.samples
        else [f"the first 8 of {len(files)} images were taken; more with --samples"]
    )
    if options.samples and options.samples > len(files):
        raise ValueError(
            f"--samples {options.samples}: {options.text} holds {len(files)} images; give at most "
            "that many"
        )
    pixels, seen, more = read_images(chosen, target)
    described = f"{len(chosen)} image{'s' * (len(chosen) > 1)} of {options.text}"
    return Inputs(
        {"pixel_values": pixels},
        len(chosen),
        0,
        described,
        images=seen,
        notes=notes + more,
    )


def _from_tokens(target: LoadedModel, options: AnalyzeOptions, text: Text, source: str) -> Inputs:
    notes = list(text.notes)
    if len(text.rows) > 1:
        rows, words, more = _given_rows(text, options, source)
        notes += more
    else:
        rows, words = _stretches(target, text, options, source)
    length = max(len(row) for row in rows)
    most, hard = most_positions(target)
    if most is not None and length > most:
        if hard:
            raise ValueError(
                f"{source}: samples of {length} tokens, and the model has {most} positions; give "
                f"--length {most} or less"
            )
        notes.append(f"{length} tokens are more than the {most} that the model was made for")
    batch = _batch(target, rows, notes)
    described = f"{len(rows)} × {length} {text.unit} of {source}"
    limit = most if hard else None
    lengths = tuple(len(row) for row in rows)
    return Inputs(batch, len(rows), length, described, lengths, limit, words, notes=notes)


def _given_rows(
    text: Text, options: AnalyzeOptions, source: str
) -> tuple[list[list[int]], list[list[str]], list[str]]:
    """Return the file's rows, cut to ``--length``, and notes."""
    count = options.samples or min(len(text.rows), 16)
    if count > len(text.rows):
        raise ValueError(
            f"--samples {count}: {source} holds {len(text.rows)} rows; give at most that many"
        )
    notes = (
        []
        if options.samples or count == len(text.rows)
        else [f"the first 16 of {len(text.rows)} rows were taken; more with --samples"]
    )
    cut = slice(None, options.length)
    return (
        [row[cut] for row in text.rows[:count]],
        [each[cut] for each in text.words[:count]],
        notes,
    )


def _stretches(
    target: LoadedModel, text: Text, options: AnalyzeOptions, source: str
) -> tuple[list[list[int]], list[list[str]]]:
    """Return samples of one length, evenly over the text, with special tokens around each."""
    ids, words = text.rows[0], text.words[0]
    before, after = text.before, text.after
    around = len(before[0]) + len(after[0])
    count = options.samples or 1
    most, hard = most_positions(target)
    if options.length is not None:
        length = options.length
        if hard and most is not None and length > most:
            raise ValueError(
                f"--length {length}: the model has {most} positions; give at most {most}"
            )
        if length > len(ids) + around:
            raise ValueError(
                f"--length {length}: {source} holds {len(ids)} {text.unit}; give at most "
                f"{len(ids) + around}"
            )
    else:
        length = min(DEFAULT_LENGTH, len(ids) // count + around, *([most] if most else []))
    body = length - around
    if body < 1:
        raise ValueError(
            f"{source}: {len(ids)} {text.unit} are too few for {count} samples; give a longer "
            "text or fewer --samples"
        )
    starts = np.linspace(0, len(ids) - body, count).round().astype(int)
    if len(set(starts.tolist())) < count:
        raise ValueError(
            f"--samples {count}: {source} holds {len(ids)} {text.unit}, too few for so many "
            f"different stretches of {body}; give a smaller --length"
        )
    rows = [[*before[0], *ids[at : at + body], *after[0]] for at in starts]
    named = [[*before[1], *words[at : at + body], *after[1]] for at in starts]
    return rows, named


def _batch(target: LoadedModel, rows: list[list[int]], notes: list[str]) -> Any:
    longest = max(len(row) for row in rows)
    taken = inspect.signature(target.model.forward).parameters
    config = target.config
    pad = getattr(config, "pad_token_id", None) or 0
    ragged = any(len(row) < longest for row in rows)
    causal = "Causal" in type(target.model).__name__ or "LMHead" in type(target.model).__name__
    if ragged and "attention_mask" not in taken:
        raise ValueError(
            "the rows differ in length and the model takes no attention_mask; give rows of one "
            "length, or --length"
        )
    ids = torch.full((len(rows), longest), int(pad))
    mask = torch.zeros(len(rows), longest, dtype=torch.long)
    for place, row in enumerate(rows):
        where = slice(longest - len(row), longest) if causal else slice(0, len(row))
        ids[place, where] = torch.tensor(row)
        mask[place, where] = 1
    if "input_ids" not in taken:
        return (ids,)
    batch: dict[str, Any] = {"input_ids": ids}
    if ragged:
        batch["attention_mask"] = mask
        notes.append(
            "rows differ in length: shorter ones are padded on the "
            f"{'left' if causal else 'right'} and masked"
        )
    if getattr(config, "is_encoder_decoder", False):
        batch["decoder_input_ids"] = ids
        if ragged:
            batch["decoder_attention_mask"] = mask
        notes.append("encoder and decoder read the same tokens")
    return batch
