"""A narrow proxy of a model and its batches, for a sweep over learning rates.

B batch, S tokens.
"""

from __future__ import annotations

import copy
import inspect
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.check.loading import pretrained
from stabmon.check.loading.source import LoadedModel
from stabmon.model_names import CONFIG_DROPOUTS, FEED_FORWARD_WIDTHS, LAYER_COUNTS
from stabmon.tiny.corpus import default_text, read_text

WIDTH, LAYERS, HEADS, VOCABULARY = 128, 4, 4, 256
LENGTH, BATCH = 128, 8
HIDDEN = 0.15
"""Share of bytes for a masked model to guess.

A hidden one is read as 0, which no text holds.
"""


@dataclass(frozen=True, eq=False)
class Proxy:
    """The model and the data of a sweep."""

    make: Callable[[int], nn.Module]
    """Function from a seed to a fresh model."""
    batches: Callable[[int, int], Sequence[dict[str, Tensor]]]
    """Function from (steps, seed) to keyword arguments of the forward, one per step."""
    width: int
    full_width: int
    length: int
    note: str


def make_proxy(target: LoadedModel, attention: str | None, text: str | None, length: int) -> Proxy:
    """Make the proxy of a model.

    A model of transformers is narrowed to ``WIDTH``, a callable's model stays as it is.

    Args:
        target: the model.
        attention: attention implementation; None for the model's own choice.
        text: file to train on; None for the default text.
        length: length of a row in tokens, cut to ``LENGTH``.

    Raises:
        ValueError: if the model does not read tokens and return a loss, or the text is too short.
    """
    size = min(length, LENGTH)
    if target.make is not None:
        return _as_given(target.make, target.model, text, size)
    config, width, full = narrow(target.whole or target.config)

    def make(seed: int) -> nn.Module:
        return pretrained.from_config(config, attention, seed)

    parameters = sum(each.numel() for each in make(0).parameters())
    note = (
        f"sweep on a proxy of width {width} ({parameters:,} parameters), {size} bytes of text "
        f"a row, batch {BATCH}"
    )
    return Proxy(make, _Batches(make(0), text, size, VOCABULARY), width, full, size, note)


def narrow(config: Any) -> tuple[Any, int, int]:
    """Narrow a config to ``WIDTH``.

    The initialisation is widened so that activations and scores keep their size.

    Returns:
        The config, its width and the full width.
    """
    small = copy.deepcopy(config)
    part = small.get_text_config() if hasattr(small, "get_text_config") else small
    if not isinstance(getattr(part, "hidden_size", None), int) or not isinstance(
        getattr(part, "num_attention_heads", None), int
    ):
        raise ValueError(
            f"--sweep: {type(config).__name__} has no one width and number of heads to narrow: "
            "give module:callable"
        )
    full = part.hidden_size
    width = min(full, WIDTH)
    heads = int(part.num_attention_heads)
    key_heads = int(getattr(part, "num_key_value_heads", None) or heads)
    kept = min(heads, HEADS) if width < full else heads
    new = {"hidden_size": width, "num_attention_heads": kept, "vocab_size": VOCABULARY}
    if getattr(part, "num_key_value_heads", None):
        new["num_key_value_heads"] = max(1, kept * key_heads // heads)
    if getattr(part, "head_dim", None) and width < full:
        new["head_dim"] = width // kept
    for name in FEED_FORWARD_WIDTHS:
        if isinstance(getattr(part, name, None), int):
            new[name] = max(width, getattr(part, name) * width // full)
    kinds = list(getattr(part, "layer_types", None) or [])
    for name in LAYER_COUNTS:
        if isinstance(getattr(part, name, None), int):
            new[name] = min(getattr(part, name), LAYERS)
    for name, value in new.items():
        setattr(part, name, value)
    if kinds:
        part.layer_types = kinds[:LAYERS]
    if isinstance(getattr(part, "initializer_range", None), float):
        part.initializer_range *= math.sqrt(full / width)
    if isinstance(getattr(part, "query_pre_attn_scalar", None), int | float) and width < full:
        part.query_pre_attn_scalar = width // kept
    for name in ("bos_token_id", "eos_token_id", "pad_token_id"):
        if getattr(part, name, None) is not None:
            setattr(part, name, 0)
    for name in CONFIG_DROPOUTS:
        if isinstance(getattr(part, name, None), float):
            setattr(part, name, 0.0)
    return small, width, full


class _Batches:
    """Rows of bytes drawn from a text, as arguments of the model's forward."""

    def __init__(self, model: nn.Module, text: str | None, length: int, vocabulary: int) -> None:
        raw = (default_text() if text is None else read_text(text))[1]
        if len(raw) < 4 * length:
            raise ValueError(
                f"--text {text}: {len(raw)} bytes are too few for a sweep; give at least "
                f"{4 * length}, or leave it out"
            )
        self.data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long() % vocabulary
        self.length = length
        self.masked = "MaskedLM" in type(model).__name__
        taken = inspect.signature(model.forward).parameters
        if "input_ids" not in taken or "labels" not in taken:
            raise ValueError(
                f"--sweep: {type(model).__name__}.forward must take input_ids and labels and "
                "return a loss"
            )

    def __call__(self, steps: int, seed: int) -> list[dict[str, Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(self.data) - self.length, (steps, BATCH), generator=generator)
        rows = self.data[starts[..., None] + torch.arange(self.length)]
        if not self.masked:
            return [{"input_ids": ids, "labels": ids} for ids in rows]
        hidden = torch.rand(rows.shape, generator=generator) < HIDDEN
        return [
            {"input_ids": ids.masked_fill(gone, 0), "labels": ids.masked_fill(~gone, -100)}
            for ids, gone in zip(rows, hidden, strict=True)
        ]


def _as_given(
    make: Callable[[int], nn.Module], model: nn.Module, text: str | None, size: int
) -> Proxy:
    table = next((each for each in model.modules() if isinstance(each, nn.Embedding)), None)
    if table is None:
        raise ValueError(
            "--sweep: the model has no token embeddings and so reads no text: give one that does"
        )
    width = table.embedding_dim
    note = f"sweep on the model as it is, {size} bytes of text a row, batch {BATCH}"
    return Proxy(make, _Batches(model, text, size, table.num_embeddings), width, width, size, note)
