"""Inputs of one attention call: their check, and quantities that follow at once."""

from __future__ import annotations

import math
from functools import cached_property

import torch
from torch import Tensor

from stabmon.operator.visibility.visibility import Visibility


class AttentionInputs:
    """Query, key and all else that determines the attention of one call.

    Args:
        query: ``[B, H, Q, D]``.
        key: ``[B, H_kv, K, D]``.
        scale: scores are ``scale * query @ key.T``.
        visibility: mask, causality and window.
        softcap: scores become ``softcap * tanh(score / softcap)``; None for none.
        sinks: ``[H]`` or ``[B, H, Q]`` learned logits that join each row's softmax, or None.
        given_scores: ``[B, H, Q, K]`` scores that take the place of query and key, or None.
    """

    def __init__(
        self,
        query: Tensor,
        key: Tensor,
        scale: float,
        visibility: Visibility,
        softcap: float | None,
        sinks: Tensor | None,
        given_scores: Tensor | None = None,
    ) -> None:
        self.query = query
        self.key = key
        self.scale = scale
        self.visibility = visibility
        self.softcap = softcap
        self.sinks = sinks
        self.given_scores = given_scores
        self.exp_range: Tensor | None = None
        """``[B, H, Q]``, see :class:`~stabmon.records.AttentionCall`."""
        self.batch, self.heads, self.queries = query.shape[:3]
        self.key_heads, self.keys, self.head_dim = key.shape[1:]

    def n_visible(self) -> Tensor:
        """Return each row's number of visible keys, ``[B, H, Q]`` int64, without sinks."""
        return self.visibility.n_visible.expand(self.batch, self.heads, self.queries)

    @cached_property
    def occupied(self) -> Tensor:
        """``[B, H, Q]`` bool: the row sees at least one key."""
        return self.n_visible() > 0

    @cached_property
    def is_counted(self) -> Tensor:
        """``[B, H, Q]`` bool: the row sees a key and is not known to be padding."""
        padding = self.visibility.is_padding
        return self.occupied if padding is None else self.occupied & ~padding

    @cached_property
    def query_squared(self) -> Tensor:
        """``[B, H, Q]`` squared norm of each query."""
        query = self.query.to(self.compute_dtype)
        return (query * query).sum(-1)

    @cached_property
    def key_gram(self) -> Tensor:
        """``[B, H_kv, D, D]`` K^T K of each key head, over the keys that some query sees."""
        key, seen = self.key.to(self.compute_dtype), self.visibility.seen_keys
        if seen is not None:
            by_head = seen if seen.shape[1] == 1 else seen.unflatten(1, (self.key_heads, -1)).any(2)
            key = key.masked_fill(~by_head[..., None], 0.0)
        return key.mT @ key

    @property
    def compute_dtype(self) -> torch.dtype:
        """Dtype in which this engine computes."""
        return torch.float64 if self.query.dtype == torch.float64 else torch.float32

    def sinks_of_rows(self) -> Tensor:
        """Return the sinks of each row, ``[B, H, Q]``."""
        assert self.sinks is not None
        sinks = self.sinks if self.sinks.dim() > 1 else self.sinks.view(1, -1, 1)
        return sinks.expand(self.batch, self.heads, self.queries)

    def sinks_at(self, index: Tensor) -> Tensor | None:
        """Return the sinks of the query rows ``index``, in the shape they were given in."""
        if self.sinks is None or self.sinks.dim() == 1:
            return self.sinks
        return self.sinks[:, :, index]


def check_inputs(
    query: Tensor,
    key: Tensor,
    scale: float,
    mask: Tensor | None,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> None:
    """Check that the inputs of an operator fit each other.

    Arguments as for :func:`stabmon.operator.attention_operator`.

    Raises:
        ValueError: of one line, naming the value and the fix.
    """
    if query.dim() != 4 or key.dim() != 4:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: give [B, H, Q, D] and [B, "
            "H_kv, K, D]"
        )
    if not query.is_floating_point() or not key.is_floating_point():
        raise ValueError(
            f"query is {query.dtype} and key is {key.dtype}: give floating-point tensors"
        )
    if query.shape[0] != key.shape[0] or query.shape[3] != key.shape[3]:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)} differ in batch or head "
            "dimension: make these equal"
        )
    if 0 in query.shape or 0 in key.shape:
        raise ValueError(
            f"query {tuple(query.shape)} and key {tuple(key.shape)}: nothing to attend in an "
            "empty batch, give data"
        )
    if query.shape[1] % key.shape[1]:
        raise ValueError(
            f"{query.shape[1]} query heads over {key.shape[1]} key heads: the first must be a "
            "multiple of the second"
        )
    if query.device != key.device:
        raise ValueError(
            f"query is on {query.device} and key on {key.device}: move both to one device"
        )
    if not math.isfinite(scale) or scale == 0:
        raise ValueError(
            f"scale {scale!r}: give a finite number other than 0, usually head_dim ** -0.5"
        )
    if window is not None and window < 1:
        raise ValueError(f"window {window!r}: give at least 1, or None for no window")
    if softcap is not None and not softcap > 0:
        raise ValueError(f"softcap {softcap!r}: give a positive number, or None for none")
    if sinks is not None and sinks.shape not in ((query.shape[1],), query.shape[:3]):
        raise ValueError(
            f"sinks of shape {tuple(sinks.shape)}: give one logit a query head, "
            f"[{query.shape[1]}], or a row, {list(query.shape[:3])}"
        )
    if mask is not None:
        wanted = (query.shape[0], query.shape[1], query.shape[2], key.shape[2])
        if mask.dtype != torch.bool and not mask.is_floating_point():
            raise ValueError(
                f"mask is {mask.dtype}: give bool (True is visible) or an additive float mask"
            )
        try:
            fits = torch.broadcast_shapes(mask.shape, wanted) == torch.Size(wanted)
        except RuntimeError:
            fits = False
        if not fits:
            raise ValueError(
                f"mask of shape {tuple(mask.shape)} does not broadcast to [B, H, Q, K] = "
                f"{list(wanted)}: reshape it"
            )
