"""Put attention patterns into a record that figures and pages are drawn from."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any, Protocol

import numpy as np

from stabmon.analysis.attention_maps import AttentionMaps
from stabmon.analysis.compression_advice import Recommendation
from stabmon.analysis.head_roles import HeadRole
from stabmon.analysis.insights import Insight
from stabmon.analysis.record import AnalysisRecord
from stabmon.analysis.similarity import LayerSimilarity


class Patterns(Protocol):
    """The parts of :class:`stabmon.analysis.patterns.AttentionPatterns` that are stored."""

    statistics: dict[str, dict[str, np.ndarray]]
    over_queries: dict[str, dict[str, np.ndarray]]
    queries: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    received: dict[str, np.ndarray]
    seen_by: dict[str, np.ndarray]
    kinds: dict[str, str]
    roles: list[HeadRole]
    insights: list[Insight]
    recommendations: list[Recommendation]
    rejected: list[Recommendation]
    similarity: LayerSimilarity | None
    maps: AttentionMaps | None
    notes: list[str]


def patterns_record(found: Patterns) -> AnalysisRecord:
    """Return a record of kind ``patterns``.

    Values:
        ``layers``: names in the order of the forward; ``kinds``: layer -> causal, bidirectional or
        cross; ``statistics_names`` and ``over_queries_names``: names along the first axis of
        those arrays; ``roles``: list of {layer, head, role, evidence}; ``insights``: list of
        {kind, text, layers, numbers, threshold, n}; ``recommendations`` and ``rejected``: list of
        the fields of ``Recommendation`` (policy, keep, context, loss, full_loss, cost,
        standard_error, n, recency_cost, random_cost, text, reason); ``notes``: list of strings;
        ``pooling`` (layer -> [queries, keys] a pixel) and ``map_sizes`` (layer -> [Q, K]) where
        there are maps; ``similarity_layers``: names along the axes of ``similarity``.
    Arrays:
        ``statistics/<layer>`` ``[N, B, H]`` and ``over_queries/<layer>`` ``[M, B, H]`` float64;
        ``rows/<layer>`` ``[B, H, K]`` float32; ``received/<layer>`` ``[B, H, K]`` float64;
        ``seen_by/<layer>`` ``[B, K]``, ``positions/<layer>`` and ``queries/<layer>`` ``[B]``
        int64; ``similarity`` ``[B, L, L]`` float64; ``maps/<layer>`` ``[H, P, R]`` float32 of the
        first sample.
    """
    first = next(iter(found.statistics))
    names, over = list(found.statistics[first]), list(found.over_queries[first])
    values: dict[str, Any] = {
        "layers": list(found.statistics),
        "kinds": dict(found.kinds),
        "statistics_names": names,
        "over_queries_names": over,
        "roles": [asdict(role) for role in found.roles],
        "insights": [asdict(insight) for insight in found.insights],
        "recommendations": [asdict(each) for each in found.recommendations],
        "rejected": [asdict(each) for each in found.rejected],
        "notes": list(found.notes),
    }
    arrays = _by_layer("statistics", {n: _stack(s, names) for n, s in found.statistics.items()})
    arrays |= _by_layer("over_queries", {n: _stack(s, over) for n, s in found.over_queries.items()})
    for what in ("rows", "received", "seen_by", "positions", "queries"):
        arrays |= _by_layer(what, getattr(found, what))
    if found.similarity is not None:
        values["similarity_layers"] = list(found.similarity.layers)
        arrays["similarity"] = found.similarity.cosine
    if found.maps is not None:
        values["pooling"] = {layer: list(f) for layer, f in found.maps.factors.items()}
        values["map_sizes"] = {layer: list(s) for layer, s in found.maps.sizes.items()}
        arrays |= _by_layer("maps", found.maps.maps)
    return AnalysisRecord("patterns", values, arrays)


def _stack(statistics: Mapping[str, np.ndarray], names: list[str]) -> np.ndarray:
    return np.stack([statistics[name] for name in names])


def _by_layer(what: str, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {f"{what}/{layer}": value for layer, value in values.items()}
