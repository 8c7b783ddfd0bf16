"""Tell what a captured call is: over another sequence, of which tokens, with which padding."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.records import AttentionCall

CROSS = ("cross", "encoder_attn", "encdecattention", "enc_attn")
"""Parts of names of attention over another sequence's keys."""


def reads_other_sequence(call: AttentionCall) -> bool:
    """Whether queries and keys of a call come of two sequences.

    Known where the call is causal, or the capture has seen queries and keys made of one tensor.
    Else the module's name decides, and lengths that differ with several queries.

    Args:
        call: a captured call.
    """
    if call.is_causal or call.is_self:
        return False
    module = call.module
    words = f"{call.layer.rpartition('.')[2]} {type(module).__name__}".lower()
    if getattr(module, "is_cross_attention", False) or any(word in words for word in CROSS):
        return True
    queries, keys = lengths_of(call)
    return queries != keys and queries != 1


def lengths_of(call: AttentionCall) -> tuple[int, int]:
    """Return how many queries and keys a call has."""
    if call.query is not None and call.key is not None:
        return call.query.shape[2], call.key.shape[2]
    assert call.scores is not None
    return call.scores.shape[2], call.scores.shape[3]


def token_ids(model: nn.Module, batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the token ids ``[B, S]`` that a batch gives to the model, and those of its decoder.

    Args:
        model: the model.
        batch: what its forward takes.

    Returns:
        Ids of the model's own sequence, and of the decoder of an encoder–decoder; None for none.

    Example:
        >>> token_ids(nn.Linear(1, 1), {"input_ids": torch.tensor([[1, 2]])})
        (tensor([[1, 2]]), None)
        >>> token_ids(nn.Linear(1, 1), torch.randn(1, 3, 8, 8))
        (None, None)
    """
    if isinstance(batch, Mapping):
        own, decoder = batch.get("input_ids"), batch.get("decoder_input_ids")
        labels = batch.get("labels")
        config = getattr(model, "config", None)
        shift = getattr(model, "prepare_decoder_input_ids_from_labels", None)
        if decoder is None and labels is not None and callable(shift):
            decoder = shift(labels) if getattr(config, "is_encoder_decoder", False) else None
        return _ids(own), _ids(decoder)
    parts = batch if isinstance(batch, tuple | list) else (batch,)
    return next((ids for part in parts if (ids := _ids(part)) is not None), None), None


def _ids(value: Any) -> Tensor | None:
    if not isinstance(value, Tensor) or value.dim() != 2:
        return None
    whole = value.dtype in (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)
    return value.long() if whole else None
