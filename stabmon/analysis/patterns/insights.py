"""Insights into attention patterns, in words with numbers, threshold and n."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stabmon.analysis.patterns.similarity import LayerSimilarity

LEAST_QUERIES = 32
"""Smallest number of a head's queries, over all samples, for an insight."""
LEAST_CONTEXT = 16
"""Smallest mean number of context keys: short rows are alike whatever the head."""
RECENCY = 0.8
"""Smallest share of the newest quarter's weight; 0.5 is even, 0.8 four to one.

The share is in the weight of the newest and the oldest quarter.
"""
SPARSE = 0.4
"""Largest normalised entropy of a head with few attended keys."""
UNIFORM = 0.9
"""Smallest normalised entropy of a head with nearly even attention."""
CLUSTERED = 0.5
"""Smallest overlap of a row with itself moved by one key, above chance.

As a share of the overlap without moving.
"""
SINK = 0.3
"""Smallest mean weight on the first key (Gu et al. 2024)."""
REDUNDANT = 0.95
"""Smallest cosine of two layers' maps for a redundant pair."""


@dataclass(frozen=True, eq=False)
class Insight:
    """One finding about the batch.

    Attributes:
        kind: ``recency``, ``sparse``, ``uniform``, ``clustered``, ``sinks`` or
            ``redundant_layers``.
        text: the finding in words.
        layers: the layers concerned.
        numbers: its evidence: ``heads`` (number of heads concerned), ``all_heads`` (number of all
            heads), ``median`` over the heads concerned, and ``where`` [[layer, head, value], …].
        threshold: the threshold of the value.
        n: queries per head, over all samples; of ``redundant_layers``, samples.

    Example:
        >>> Insight("sinks", "1 of 2 heads rests on the first key.", ("h.0",), threshold=0.3).kind
        'sinks'
    """

    kind: str
    text: str
    layers: tuple[str, ...]
    numbers: dict[str, Any] = field(default_factory=dict)
    threshold: float = 0.0
    n: int = 0


@dataclass(frozen=True)
class _Head:
    layer: str
    head: int
    values: dict[str, float]
    queries: int
    kind: str


Means = Mapping[str, Mapping[str, np.ndarray]]


def find_insights(
    over_queries: Means,
    queries: Mapping[str, np.ndarray],
    kinds: Mapping[str, str],
    similarity: LayerSimilarity | None = None,
) -> list[Insight]:
    """Draw insights from means over all valid queries.

    There are no insights about heads with fewer than 32 queries or fewer than 16 keys of context on
    average, and none about recency and sinks in cross attention.

    Args:
        over_queries: ``[layer][name]`` ``[B, H]``, means over the valid queries.
        queries: layer -> ``[B]``, number of queries behind each mean.
        kinds: layer -> ``causal``, ``bidirectional`` or ``cross``.
        similarity: cosines of the layers' maps.

    Returns:
        Insights; an empty list where nothing stands out.
    """
    heads = [head for head in _heads(over_queries, queries, kinds) if head.queries >= LEAST_QUERIES]
    heads = [head for head in heads if head.values["context_size"] >= LEAST_CONTEXT]
    causal = [head for head in heads if head.kind == "causal"]
    insights = [
        _about(
            "recency",
            causal,
            "recent_share",
            lambda x: x >= RECENCY,
            RECENCY,
            "attend mostly to recent keys: of the weight on the newest and the oldest quarter of "
            "the context, {median:.0%} is on the newest (even would be 50%)",
        ),
        _about(
            "sparse",
            heads,
            "normalized_entropy",
            lambda x: x <= SPARSE,
            SPARSE,
            "attend to few keys: their entropy is {median:.0%} of the largest possible",
        ),
        _about(
            "uniform",
            heads,
            "normalized_entropy",
            lambda x: x >= UNIFORM,
            UNIFORM,
            "attend to nearly all keys alike: their entropy is {median:.0%} of the largest "
            "possible",
        ),
        _about(
            "clustered",
            [head for head in heads if head.values["normalized_entropy"] < UNIFORM],
            "clustering",
            lambda x: x >= CLUSTERED,
            CLUSTERED,
            "spend their weight in runs of neighbouring keys: moved by one key, a row overlaps "
            "with itself by {median:.0%} of what it does unmoved",
        ),
        _about(
            "sinks",
            [head for head in heads if head.kind != "cross"],
            "sink_mass",
            lambda x: x >= SINK,
            SINK,
            "rest on the first key with {median:.0%} of their weight: an attention sink, which "
            "trained models have and a compressed cache must keep",
        ),
    ]
    return [each for each in insights if each is not None] + _redundant(similarity, heads)


def _heads(
    over_queries: Means, queries: Mapping[str, np.ndarray], kinds: Mapping[str, str]
) -> list[_Head]:
    heads = []
    for layer, values in over_queries.items():
        weight = queries[layer].astype(float)
        total = int(weight.sum())
        kept = {name: _mean(value, weight) for name, value in values.items()}
        chance = 1 / np.maximum(values["context_size"], 2)
        above = _mean((values["clustering"] - chance) / (1 - chance), weight)
        kept["clustering"] = above
        for head in range(values["entropy"].shape[1]):
            each = {name: float(value[head]) for name, value in kept.items()}
            heads.append(_Head(layer, head, each, total, kinds[layer]))
    return heads


def _mean(values: np.ndarray, weight: np.ndarray) -> np.ndarray:
    """Return the mean over samples by their number of queries, ``[H]``.

    Samples without queries are left out.
    """
    if not weight.sum():
        return np.full(values.shape[1], np.nan)
    some = weight > 0
    mean: np.ndarray = (values[some] * weight[some, None]).sum(0) / weight.sum()
    return mean


def _about(
    kind: str,
    heads: list[_Head],
    name: str,
    holds: Callable[[float], bool],
    threshold: float,
    words: str,
) -> Insight | None:
    hits = [head for head in heads if holds(head.values[name])]
    if not hits:
        return None
    median = float(np.median([head.values[name] for head in hits]))
    layers = tuple(dict.fromkeys(head.layer for head in hits))
    n = min(head.queries for head in hits)
    where = [[head.layer, head.head, head.values[name]] for head in hits]
    text = (
        f"{len(hits)} of {len(heads)} heads, in {len(layers)} layer{'s' * (len(layers) > 1)}, "
        f"{words.format(median=median)} (median; threshold {threshold:g}, {n} queries per head)."
    )
    numbers = {
        "heads": len(hits),
        "all_heads": len(heads),
        "median": median,
        "statistic": name,
        "where": where,
    }
    return Insight(kind, text, layers, numbers, threshold, n)


def _redundant(similarity: LayerSimilarity | None, heads: list[_Head]) -> list[Insight]:
    """Return the pairs of layers with similar maps, unless all attention is even."""
    if similarity is None:
        return []
    enough = {head.layer for head in heads}
    names = similarity.layers
    some = np.isfinite(similarity.cosine)
    count = np.maximum(some.sum(0), 1)
    cosine = np.where(some, similarity.cosine, 0.0).sum(0) / count
    pairs = [
        (names[a], names[b], float(cosine[a, b]))
        for a in range(len(names))
        for b in range(a + 1, len(names))
        if cosine[a, b] >= REDUNDANT and {names[a], names[b]} <= enough
    ]
    if not pairs:
        return []
    layers = tuple(dict.fromkeys(name for a, b, _ in pairs for name in (a, b)))
    best = max(pairs, key=lambda pair: pair[2])
    n = int(some.sum(0).max())
    samples = f"{n} sample{'s' * (n > 1)}"
    text = (
        f"{len(pairs)} pair{'s' * (len(pairs) > 1)} of layers attend alike: the cosine of their "
        f"head-mean maps is at least {REDUNDANT:g}, the most {best[2]:.3f} between {best[0]} and "
        f"{best[1]} ({samples})."
    )
    numbers = {"pairs": [list(pair) for pair in pairs], "largest": best[2]}
    return [Insight("redundant_layers", text, layers, numbers, REDUNDANT, n)]
