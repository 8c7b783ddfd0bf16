"""Recommendations of a cache compression, with their measured cost."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, eq=False)
class Recommendation:
    """One way to compress the cache, with its cost; losses in nats.

    Attributes:
        policy: ``keep_recent``, ``keep_recent_and_sinks`` (the first 4 and the newest),
            ``top_k`` (the largest weights of each query), ``diverse`` (the newest half, and the
            older keys least like their mean) or ``grouping`` (older neighbours merged).
        keep: keys kept per query and head.
        context: keys visible to the longest query.
        loss, full_loss: mean loss of the touched tokens with and without the compression.
        cost: ``loss - full_loss``.
        standard_error: standard error of the cost, over tokens taken as independent.
        by_sample: cost of each sample; NaN if none of its tokens is touched.
        n: number of touched tokens.
        recency_cost, random_cost: cost of as many newest and as many random keys.
        text: the advice for or against it, in words.
        reason: the reason against it; empty if it is advised.
        options: further numbers, such as ``sinks`` or ``group_size``.

    Example:
        >>> costs = {"cost": 0.004, "standard_error": 0.001, "recency_cost": 0.004}
        >>> Recommendation(
        ...     "keep_recent", 64, 512, loss=2.004, full_loss=2.0, by_sample=[0.004], n=448,
        ...     random_cost=0.2, text="Keep the 64 newest keys.", **costs,
        ... ).reason
        ''
    """

    policy: str
    keep: int
    context: int
    loss: float
    full_loss: float
    cost: float
    standard_error: float
    by_sample: list[float]
    n: int
    recency_cost: float
    random_cost: float
    text: str
    reason: str = ""
    options: dict[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class CompressionAdvice:
    """Recommendations, rejected candidates and notes.

    Example:
        >>> CompressionAdvice(notes=["no query sees more than 3 keys"]).rejected
        []
    """

    recommendations: list[Recommendation] = field(default_factory=list)
    rejected: list[Recommendation] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
