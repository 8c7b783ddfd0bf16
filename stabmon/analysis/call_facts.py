"""Facts of a captured call: the sequence and the tokens it reads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.rollout.stacks import CallReader
from stabmon.model_names import CROSS_ATTENTION
from stabmon.records import AttentionCall


def reads_other_sequence(call: AttentionCall, reader: CallReader) -> bool:
    """Return whether a call attends to another sequence.

    Call it while the model's forward runs.

    Args:
        call: a captured call. A single query over several keys counts as a decoding step unless its
            module's name says otherwise.
        reader: reader of this model's calls.
    """
    if call.is_causal or call.is_self:
        return False
    seen = reader.describe(call)
    if seen.queries == 1 < seen.keys and not CROSS_ATTENTION.search(call.layer):
        return bool(getattr(call.module, "is_cross_attention", False))
    return seen.kind == "cross"


def token_ids(model: nn.Module, batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """Return the token ids of a batch, and those of its decoder.

    Args:
        model: the model.
        batch: the input of its forward.

    Returns:
        Ids ``[B, S]`` of the model's own sequence, and of the decoder of an encoder–decoder; None
        for none.

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
