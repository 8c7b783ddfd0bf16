"""Result of an analysis of attention patterns, and its record for figures."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from stabmon.analysis.compression.recommendation import Recommendation
from stabmon.analysis.patterns.head_roles import HeadRole
from stabmon.analysis.patterns.insights import Insight
from stabmon.analysis.patterns.maps import AttentionMaps
from stabmon.analysis.patterns.similarity import LayerSimilarity
from stabmon.analysis.record import AnalysisRecord


@dataclass(frozen=True, eq=False)
class AttentionPatterns:
    """Patterns of one batch, float64 NumPy arrays by layer.

    B samples, H query heads, K keys.

    The context of a query is every key that it sees but its own: the keys before it under
    causality, the keys on both sides in bidirectional attention, all visible keys in cross
    attention. Probabilities are the model's own, not renormalised over the context.

    Attributes:
        statistics: ``[layer][name]`` ``[B, H]`` of the chosen query: ``mean``, ``variance`` (over
            the n keys of the context, divided by n), ``std``, ``max``, ``argmax`` (index of a
            key, -1 without a context), ``entropy`` (-sum p ln p, nats), ``max_entropy`` (ln n),
            ``normalized_entropy`` (entropy / ln n), ``focus`` (1 / entropy; inf where one key
            holds everything), ``recent_distant_ratio`` (mean weight of the newest max(1, n // 4)
            keys over that of the oldest; inf where only the oldest have none), ``context_mass``
            (sum p), ``context_size`` (n), ``sink_mass`` (weight of the first visible key) and
            ``mean_distance`` (sum of p_ij |i - j|, tokens; NaN in cross attention). NaN where a
            sample has no such query, or its context has too few keys.
        over_queries: ``[layer][name]`` ``[B, H]``, means over all valid queries with at least two
            keys of context: ``entropy``, ``normalized_entropy``, ``recent_distant_ratio``,
            ``sink_mass``, ``mean_distance``, ``context_mass``, ``context_size``; and pooled over
            these queries ``pooled_recent_distant_ratio``, ``recent_share`` (newest over newest
            and oldest quarter, 0.5 is even) and ``clustering`` (sum p_j p_{j+1} / sum p_j^2).
        queries: layer -> ``[B]``, number of queries behind these means.
        positions: layer -> ``[B]``, row of the chosen query, -1 in samples without it.
        rows: layer -> ``[B, H, K]`` float32, the chosen query's weights, its own key included.
        received: layer -> ``[B, H, K]``, weight received by each key from all valid queries.
        seen_by: layer -> ``[B, K]``, number of valid queries that see each key.
        kinds: layer -> ``causal``, ``bidirectional`` or ``cross``.
        roles: at least one per head, see :class:`HeadRole`; none if the text is too short.
        insights: remarkable findings, in words with numbers.
        recommendations: ways of compressing the KV cache, each measured on the model's loss.
        rejected: measured ways of too high a cost, each with its reason.
        similarity: cosines of the layers' maps, or None.
        maps: maps of the first sample, or None.
        notes: limits of the analysis, in words.

    Example:
        >>> from torch import nn, randn
        >>> from stabmon.analysis import attention_patterns
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> attention_patterns(layer, randn(3, 6, 8), advice=False).layers
        ('self_attn',)
    """

    statistics: dict[str, dict[str, np.ndarray]]
    over_queries: dict[str, dict[str, np.ndarray]]
    queries: dict[str, np.ndarray]
    positions: dict[str, np.ndarray]
    rows: dict[str, np.ndarray]
    received: dict[str, np.ndarray]
    seen_by: dict[str, np.ndarray]
    kinds: dict[str, str]
    roles: list[HeadRole] = field(default_factory=list)
    insights: list[Insight] = field(default_factory=list)
    recommendations: list[Recommendation] = field(default_factory=list)
    rejected: list[Recommendation] = field(default_factory=list)
    similarity: LayerSimilarity | None = None
    maps: AttentionMaps | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def layers(self) -> tuple[str, ...]:
        """Return the names of the layers, in the order of the forward."""
        return tuple(self.statistics)

    def roles_of(self, layer: str, head: int) -> list[str]:
        """Return the names of a head's roles, the most specific first.

        Args:
            layer: the layer's name.
            head: the query head.
        """
        return [r.role for r in self.roles if r.layer == layer and r.head == head]

    def over_samples(self) -> dict[str, dict[str, dict[str, np.ndarray]]]:
        """Summarise the statistics over the samples.

        Returns:
            ``[layer][name]`` -> ``mean``, ``std``, ``min``, ``q25``, ``median``, ``q75``, ``max``,
            each ``[H]``; NaN of single samples left out.
        """
        return {
            layer: {name: _distribution(values) for name, values in stats.items()}
            for layer, stats in self.statistics.items()
        }

    def to_record(self) -> AnalysisRecord:
        """Return a record of kind ``patterns``; see :func:`patterns_record`."""
        return patterns_record(self)


def patterns_record(found: AttentionPatterns) -> AnalysisRecord:
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


def _distribution(values: np.ndarray) -> dict[str, np.ndarray]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # NaN in every sample
        q25, median, q75 = np.nanquantile(values, [0.25, 0.5, 0.75], axis=0)
        return {
            "mean": np.nanmean(values, axis=0),
            "std": np.nanstd(values, axis=0),
            "min": np.nanmin(values, axis=0),
            "q25": q25,
            "median": median,
            "q75": q75,
            "max": np.nanmax(values, axis=0),
        }
