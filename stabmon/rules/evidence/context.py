"""Context of an alarm beside the head's own numbers: rate, weights and loss."""

from __future__ import annotations

import math

import numpy as np

from stabmon.rules.tracking.history import History

FROZEN = (
    "Lower the learning rate: W_q and W_k of this layer are frozen, and its scores grew by what "
    "is trained around them (adapters, prompts, layers before it)."
)
"""Suggestion for scores of a layer whose W_q and W_k are frozen."""


def context_of(
    history: History, layer: str | None, log_slope: float = math.nan
) -> dict[str, float]:
    """Return the rate, the motion of the weights and the loss beside an issue.

    Args:
        history: the readings so far.
        layer: the layer of the issue; None for the run.
        log_slope: growth of ln max-score per optimizer step.

    Returns:
        Plain numbers, NaN where unknown:

        - ``learning_rate``: the largest over the optimizer's groups;
        - ``log_slope_per_rate``: ``log_slope`` over that rate;
        - ``query_key_update``: share of W_q and W_k that one step changed;
        - ``query_key_gradient``: their gradient over their own norm;
        - ``loss_change``: median of the newest losses minus that of as many before, in nats.
    """
    rate = history.latest.learning_rate
    step = history.latest.query_key.get(layer or "")
    known = history.recent_losses[-40:, 1]
    older, newer = np.split(known, [len(known) // 2])
    return {
        "learning_rate": math.nan if rate is None else rate,
        "log_slope_per_rate": log_slope / rate if rate else math.nan,
        "query_key_update": math.nan if step is None else step.relative_update,
        "query_key_gradient": step.gradient / step.weight if step and step.weight else math.nan,
        "loss_change": float(np.median(newer) - np.median(older)) if len(known) >= 8 else math.nan,
    }


def advice(history: History, layer: str | None, usual: str) -> str:
    """Return the suggestion about scores that grew.

    Args:
        history: the readings so far.
        layer: the layer of the issue.
        usual: suggestion about the layer's W_q and W_k; where these are frozen it is the rate
            instead.
    """
    info = history.info.get(layer or "")
    return FROZEN if info is not None and info.adapted else usual
