"""A signal: the range of the scores of each attention row."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon.operator import AttentionOperator
from stabmon.signals.base import Signal


def score_range(attention: AttentionOperator) -> Tensor:
    """Return the largest minus the smallest score of each row.

    Args:
        attention: the attention of one call; B batch, H query heads, Q queries.

    Returns:
        ``[B, H, Q]``, at least 0; 0 for a row that sees nothing.

    Source:
        Rows whose softmax cannot prefer any key have range 0.
    """
    found = attention.max_logit() - attention.min_logit()
    return torch.where(attention.occupied, found, 0.0)


SCORE_RANGE = Signal(
    "score_range", score_range, unit="nats", reduction="max", needs=("max_logit", "min_logit")
)
