"""Advice on the compression of a KV cache, measured on the model's own loss.

The batch is run teacher-forced while every query sees only the keys of a compressed cache. The cost
is the rise of the loss, in nats per token, over the tokens with more visible keys than are kept;
the others lose nothing and would only dilute it.
"""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from stabmon.analysis.compression.key_choices import (
    SINKS,
    DiverseKeys,
    GroupedKeys,
    KeyChoice,
    RandomKeys,
    RecentKeys,
    TopKeys,
)
from stabmon.analysis.compression.loss_trial import (
    LEAST_KEEP,
    LossFunction,
    LossTrial,
    NotMeasurable,
)
from stabmon.analysis.compression.recommendation import CompressionAdvice, Recommendation

TOLERANCE = 0.01
"""Largest rise of the loss, in nats, of an advised compression."""
SHARES = (16, 8, 4, 2)
"""Divisors of the context for the numbers of keys to try, fewest keys first."""
ERRORS = 2
"""Standard errors of the cost to fit under the tolerance too."""
LEAST_TOKENS = 32
"""Smallest number of touched tokens for an advice."""
SIMPLER = "and are simpler to keep"


def compression_advice(
    model: nn.Module,
    batch: Any,
    *,
    loss_fn: LossFunction | None = None,
    tolerance: float = TOLERANCE,
    seed: int = 0,
) -> CompressionAdvice:
    """Measure ways of compressing the cache and advise the nearly free ones.

    Candidates are, for a sixteenth, an eighth, a quarter and half of the longest context, the
    newest keys, the newest with the first four, the largest weights, a diverse choice, and merged
    neighbours, in all self-attention layers with the whole context visible (sliding layers hold few
    keys anyway and are left out). Of each way the smallest number of keys with a cost of at most
    ``tolerance``, two standard errors included, is advised, unless the newest keys alone do as
    well. Up to 25 forwards.

    Args:
        model: a causal language model whose attention goes through transformers' interface or
            ``scaled_dot_product_attention``.
        batch: the input of its forward.
        loss_fn: (output, batch) -> losses in nats, ``[B, S]`` (of query i's prediction) or ``[B]``;
            None for the cross-entropy of the next token in ``input_ids``.
        tolerance: largest advised rise of the loss, in nats.
        seed: seed of the random keys; the global random state is left alone.

    Returns:
        The advice; empty with a note if the model has no such loss or cannot be rewritten.

    Raises:
        ValueError: if ``loss_fn`` returns anything but losses ``[B, S]`` or ``[B]``.

    Example:
        >>> import torch
        >>> compression_advice(nn.TransformerEncoderLayer(8, 2), torch.randn(2, 3, 8)).notes
        ['no compression advice: the batch has no token ids, so there is no next-token loss']
    """
    try:
        trial = LossTrial(model, batch, loss_fn, seed)
    except NotMeasurable as reason:
        return CompressionAdvice(notes=[f"no compression advice: {reason}"])
    advice = CompressionAdvice()
    if trial.left_out:
        advice.notes.append(
            f"compression advice leaves {len(trial.left_out)} of {trial.layers} attention layers "
            f"as they are, which see part of the context only: {', '.join(trial.left_out[:3])}"
        )
    sizes = sorted({max(LEAST_KEEP, trial.context // share) for share in SHARES})
    for policy in ("keep_recent", "keep_recent_and_sinks", "top_k", "diverse", "grouping"):
        for keep in (size for size in sizes if size < trial.context):
            result = _tried(trial, policy, keep, tolerance)
            (advice.rejected if result.reason else advice.recommendations).append(result)
            if not result.reason or result.reason.endswith(SIMPLER):
                break
    return advice


def _tried(trial: LossTrial, policy: str, keep: int, tolerance: float) -> Recommendation:
    choice, options = _choice(policy, keep, trial.context)
    recent = trial.cost("keep_recent", keep, RecentKeys(keep))
    chance = trial.cost("random", keep, RandomKeys(keep, trial.seed))
    cost = trial.cost(policy, keep, choice)
    reason = ""
    if cost.n < LEAST_TOKENS:
        reason = f"only {cost.n} tokens see more than {keep} keys, too few for a verdict"
    elif not cost.rise <= tolerance:
        reason = f"it costs {cost.rise:.3g} nats a token, more than {tolerance:g}"
    elif not cost.rise + ERRORS * cost.error <= tolerance:
        reason = f"its cost may be {cost.rise + ERRORS * cost.error:.3g} nats, give more text"
    elif policy != "keep_recent" and recent.rise <= max(cost.rise, tolerance / 2):
        reason = f"as many newest keys cost {recent.rise:.3g} nats, {SIMPLER}"
    words = {
        "keep_recent": f"keep the {keep} newest keys",
        "keep_recent_and_sinks": f"keep the first {SINKS} and the {keep - SINKS} newest keys",
        "top_k": f"read the {keep} keys with the largest weights of each query",
        "diverse": f"keep the {keep - keep // 2} newest keys and the {keep // 2} older ones least "
        "like their mean",
        "grouping": f"keep the {keep // 2} newest keys and merge older neighbours by "
        f"{options.get('group_size', 0)}",
    }[policy]
    measured = (
        f"{cost.rise:+.4f} ± {cost.error:.4f} nats a token over {cost.n} tokens of "
        f"{len(cost.by_sample)} sample{'s' * (len(cost.by_sample) != 1)} (newest keys "
        f"{recent.rise:+.4f}, random keys {chance.rise:+.4f})"
    )
    words = f"{words}, of a context of {trial.context}"
    text = f"{words[0].upper()}{words[1:]}: {measured}."
    if reason:
        text = f"Do not {words}: {reason}; measured {measured}."
    elif chance.rise <= tolerance:
        text += " Random keys do as well: this text hardly needs its context."
    return Recommendation(
        policy,
        keep,
        trial.context,
        cost.loss,
        cost.full,
        cost.rise,
        cost.error,
        cost.by_sample,
        cost.n,
        recent.rise,
        chance.rise,
        text,
        reason,
        options,
    )


def _choice(policy: str, keep: int, context: int) -> tuple[KeyChoice, dict[str, int]]:
    if policy == "keep_recent":
        return RecentKeys(keep), {}
    if policy == "keep_recent_and_sinks":
        return RecentKeys(keep, SINKS), {"sinks": SINKS}
    if policy == "top_k":
        return TopKeys(keep), {}
    if policy == "diverse":
        return DiverseKeys(keep), {}
    single = keep // 2
    size = max(2, math.ceil((context - single) / max(1, keep - single - 1)))
    return GroupedKeys(keep, size), {"group_size": size}
