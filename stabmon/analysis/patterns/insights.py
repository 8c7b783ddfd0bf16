"""Say in words what stands out in attention patterns, each with its numbers, threshold and n."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from stabmon.analysis.patterns.similarity import LayerSimilarity

LEAST_QUERIES = 32
"""Queries of a head, over all samples, below which nothing is said about it."""
LEAST_CONTEXT = 16
"""Mean keys of context below which nothing is said: short rows look alike whatever the head."""
RECENCY = 0.8
"""Weight of the newest quarter among newest and oldest; 0.5 is even, 0.8 is four to one."""
SPARSE = 0.4
"""Normalised entropy below which a head looks at few keys."""
UNIFORM = 0.9
"""Normalised entropy above which a head looks at nearly all keys alike."""
CLUSTERED = 0.5
"""Share of a head's overlap with itself that remains when moved by one key, above chance."""
SINK = 0.3
"""Mean weight on the first key (Gu et al. 2024)."""
REDUNDANT = 0.95
"""Cosine of two layers' maps from which they look alike."""


@dataclass(frozen=True, eq=False)
class Insight:
    """One finding about the batch.

    Attributes:
        kind: ``recency``, ``sparse``, ``uniform``, ``clustered``, ``sinks`` or
            ``redundant_layers``.
        text: the finding in words.
        layers: layers it is about.
        numbers: what it rests on: ``heads`` (how many it holds for), ``all_heads`` (of how many),
            ``median`` over the heads it holds for, and ``where`` [[layer, head, value], …].
        threshold: what the value was held against.
        n: queries of a head, over all samples; of ``redundant_layers``, samples.
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

    Nothing is said about heads with fewer than 32 queries, or with fewer than 16 keys of context
    on average; nothing about recency and sinks in cross attention.

    Args:
        over_queries: ``[layer][name]`` ``[B, H]``, means over the valid queries.
        queries: layer -> ``[B]``, how many queries these are over.
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
            "look mostly at recent keys: of the weight on the newest and the oldest quarter of the "
            "context, {median:.0%} is on the newest (even would be 50%)",
        ),
        _about(
            "sparse",
            heads,
            "normalized_entropy",
            lambda x: x <= SPARSE,
            SPARSE,
            "look at few keys: their entropy is {median:.0%} of the largest possible",
        ),
        _about(
            "uniform",
            heads,
            "normalized_entropy",
            lambda x: x >= UNIFORM,
            UNIFORM,
            "look at nearly all keys alike: their entropy is {median:.0%} of the largest possible",
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
    """Mean over samples by their number of queries, ``[H]``; samples without any left out."""
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
        f"{words.format(median=median)} (median; threshold {threshold:g}, {n} queries a head)."
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
    """Pairs of layers whose maps look alike, if they differ from even attention at all."""
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
