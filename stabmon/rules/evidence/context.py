"""What stands beside a head's own numbers in the evidence of an alarm: the rate, how its weights
move, and the loss.
"""

from __future__ import annotations

import math

import numpy as np

from stabmon.rules.tracking.history import History

FROZEN = (
    "Lower the learning rate: W_q and W_k of this layer are frozen, and its scores grew by what "
    "is trained around them (adapters, "
    "prompts, layers before it)."
)


def circumstances(
    history: History, layer: str | None, log_slope: float = math.nan
) -> dict[str, float]:
    """Plain numbers, NaN where unknown.

    - ``learning_rate``: the largest over the optimizer's groups;
    - ``log_slope_per_rate``: growth of ln max-score a step, over that rate;
    - ``query_key_update``: what one step changed of W_q and W_k, over their own norm;
    - ``query_key_gradient``: their gradient over their own norm;
    - ``loss_change``: median of the newest losses minus that of as many before, in nats.
    """
    rate = history.latest.learning_rate
    step = history.latest.query_key.get(layer or "")
    known = history.recent_losses[-40:, 1]
    newer, older = np.split(known, [len(known) // 2])[::-1]
    return {
        "learning_rate": math.nan if rate is None else rate,
        "log_slope_per_rate": log_slope / rate if rate else math.nan,
        "query_key_update": math.nan if step is None else step.relative_update,
        "query_key_gradient": math.nan
        if step is None or not step.weight
        else step.gradient / step.weight,
        "loss_change": float(np.median(newer) - np.median(older)) if len(known) >= 8 else math.nan,
    }


def advice(history: History, layer: str | None, usual: str) -> str:
    """What to do about scores that grew: ``usual`` is about the layer's W_q and W_k; where these
    are frozen it is the rate.
    """
    info = history.info.get(layer or "")
    return FROZEN if info is not None and info.adapted else usual
