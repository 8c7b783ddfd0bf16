"""Describe where every head of a model looks: statistics, roles, insights and checked advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
from torch import Tensor, nn

from stabmon.analysis.attention_maps import AttentionMaps, pooled_map
from stabmon.analysis.call_facts import reads_other_sequence, token_ids
from stabmon.analysis.compression_advice import Recommendation, compression_advice
from stabmon.analysis.forward import run_model
from stabmon.analysis.head_roles import HeadRole, head_roles
from stabmon.analysis.insights import Insight, find_insights
from stabmon.analysis.layer_scan import LayerScan, is_causal_call, scan_layer
from stabmon.analysis.pattern_record import patterns_record
from stabmon.analysis.record import AnalysisRecord
from stabmon.analysis.role_masses import RolePattern
from stabmon.analysis.similarity import LayerSimilarity, layer_similarity
from stabmon.operator import AttentionOperator
from stabmon.records import AttentionCall
from stabmon.signals.measure import operator_of


@dataclass(frozen=True, eq=False)
class AttentionPatterns:
    """Patterns of one batch; B samples, H query heads, K keys; float64 NumPy arrays by layer.

    The context of a query is every key that it sees but its own: the keys before it under
    causality, the keys on both sides in bidirectional attention, all visible keys in cross
    attention. Probabilities are the model's own, not renormalised over the context.

    Attributes:
        statistics: ``[layer][name]`` ``[B, H]`` of the asked query: ``mean``, ``variance`` (over
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
        queries: layer -> ``[B]``, how many queries these means are over.
        positions: layer -> ``[B]``, the row of the asked query, -1 where there is none.
        rows: layer -> ``[B, H, K]`` float32, the asked query's weights, its own key included.
        received: layer -> ``[B, H, K]``, weight that each key receives from all valid queries.
        seen_by: layer -> ``[B, K]``, how many valid queries see each key.
        kinds: layer -> ``causal``, ``bidirectional`` or ``cross``.
        roles: at least one a head, see :class:`HeadRole`; none where the text is too short.
        insights: what stands out, in words with numbers.
        recommendations: how the KV cache may be compressed, each measured on the model's loss.
        rejected: what was measured too and costs too much, each with its reason.
        similarity: cosines of the layers' maps, or None.
        maps: maps of the first sample, where asked for.
        notes: what could not be told, in words.
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
        """Names of the layers, in the order of the forward."""
        return tuple(self.statistics)

    def roles_of(self, layer: str, head: int) -> list[str]:
        """Return the names of a head's roles, the most specific first."""
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
        """Return a record of kind ``patterns``; see :func:`patterns_record` for its entries."""
        return patterns_record(self)


def attention_patterns(
    model: nn.Module,
    batch: Any,
    *,
    query: int = -1,
    attention_layer_pattern: str | None = None,
    custom_roles: Mapping[str, RolePattern] | None = None,
    similarity: bool = True,
    advice: bool = True,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    map_size: int | None = None,
    attention_modules: tuple[str, ...] = (),
) -> AttentionPatterns:
    """Measure the attention patterns of every layer and head of a model on a batch.

    One forward, and one pass over each layer's rows in memory linear in the length. ``similarity``
    keeps queries and keys of all layers and passes over them again; ``advice`` costs up to some
    two dozen forwards more, and is given for causal language models.

    Args:
        model: any model; left as it was.
        batch: what its forward takes: a mapping of arguments, a tuple of them, or one tensor.
        query: which of each sample's valid queries is asked about, counted as Python counts, so
            that padding on either side does not matter: -1 is the last, 0 the first.
        attention_layer_pattern: regular expression that a layer's name must contain.
        custom_roles: name -> an offset k (key i - k), or a function (i, j, ids) -> bool of query
            positions ``[rows, 1]``, key positions ``[1, cols]`` and token ids ``[B, K]`` or None.
        similarity: whether to compare the layers' maps.
        advice: whether to measure how the KV cache may be compressed.
        loss_fn: (output, batch) -> loss of each token ``[B, S]`` or of each sample ``[B]`` in
            nats, for ``advice``; by default the next token's cross-entropy.
        map_size: take maps of the first sample too, pooled to at most so many pixels a side.
        attention_modules: patterns of modules whose hand-written softmax is attention.

    Returns:
        The patterns.

    Raises:
        ValueError: if no attention is found, no layer matches, no sample has such a query, or a
            custom role is none.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> found = attention_patterns(layer, torch.randn(3, 6, 8), advice=False)
        >>> found.statistics["self_attn"]["entropy"].shape, found.positions["self_attn"].tolist()
        ((3, 2), [5, 5, 5])

    References:
        Gu et al. 2024, "When Attention Sink Emerges in Language Models", arXiv 2410.10781;
        Olsson et al. 2022, "In-context Learning and Induction Heads", arXiv 2209.11895.
    """
    _check_roles(custom_roles or {})
    found = AttentionPatterns({}, {}, {}, {}, {}, {}, {}, {})
    kept: dict[str, AttentionOperator] = {}
    valid_of: dict[str, Tensor] = {}
    maps = AttentionMaps({}, {}, {}, 0)
    own_ids, decoder_ids = token_ids(model, batch)
    padding: dict[tuple[int, int], Tensor] = {}

    def look(call: AttentionCall) -> None:
        attention = operator_of(call)
        is_cross = reads_other_sequence(call)
        size = attention.batch, attention.queries
        valid = attention.is_counted.any(1)
        if is_cross:  # whose padded queries show in the self-attention before it only
            valid = valid & padding.get(size, valid)
        else:
            padding[size] = valid
        ids = own_ids
        if decoder_ids is not None and decoder_ids.shape == (attention.batch, attention.keys):
            ids = decoder_ids if is_causal_call(attention) else own_ids
        if is_cross or ids is None or ids.shape != (attention.batch, attention.keys):
            ids = None
        scan = scan_layer(
            attention,
            valid=valid,
            query=query,
            is_cross=is_cross,
            ids=None if ids is None else ids.to(attention.query.device),
            custom_roles=custom_roles,
        )
        _note(found, call.layer, scan)
        if similarity:
            kept[call.layer], valid_of[call.layer] = attention, valid
        if map_size is not None:
            _add_map(maps, call.layer, attention, map_size)

    run_model(
        model,
        batch,
        look,
        pattern=attention_layer_pattern,
        attention_modules=attention_modules,
    )
    if all((positions < 0).all() for positions in found.positions.values()):
        longest = max(int(n.max()) for n in found.queries.values())
        raise ValueError(f"query {query}: the longest sample has about {longest + 1} valid queries")
    if not found.roles:
        found.notes.append("no head roles: every query sees fewer than 4 keys, or 4 queries do")
    seen_ids = own_ids is not None or decoder_ids is not None
    if not seen_ids:
        found.notes.append("the batch has no token ids: induction and duplicates not testable")
    compared = layer_similarity(kept, valid_of) if kept else None
    kept.clear()
    found = replace(found, similarity=compared, maps=maps if map_size is not None else None)
    found.insights.extend(find_insights(found))
    if advice:
        advised = compression_advice(model, batch, loss_fn=loss_fn)
        found.recommendations.extend(advised.recommendations)
        found.rejected.extend(advised.rejected)
        found.notes.extend(advised.notes)
    return found


def _note(found: AttentionPatterns, layer: str, scan: LayerScan) -> None:
    found.statistics[layer] = {n: v.numpy() for n, v in scan.statistics.items()}
    found.over_queries[layer] = {n: v.numpy() for n, v in scan.over_queries.items()}
    found.queries[layer] = scan.queries.numpy()
    found.positions[layer] = scan.positions.numpy()
    found.rows[layer] = scan.row.numpy()
    found.received[layer] = scan.received.numpy()
    found.seen_by[layer] = scan.seen_by.numpy()
    causal = "causal" if scan.is_causal else "bidirectional"
    found.kinds[layer] = "cross" if scan.is_cross else causal
    if scan.roles is not None:
        found.roles.extend(head_roles(layer, scan.roles))


def _add_map(maps: AttentionMaps, layer: str, attention: AttentionOperator, size: int) -> None:
    factors = (-(-attention.queries // size), -(-attention.keys // size))
    maps.sizes[layer] = attention.queries, attention.keys
    maps.factors[layer] = factors
    maps.maps[layer] = pooled_map(attention, 0, *factors).float().cpu().numpy()


def _check_roles(custom: Mapping[str, RolePattern]) -> None:
    for name, pattern in custom.items():
        if not isinstance(pattern, int) and not callable(pattern):
            raise ValueError(
                f"custom role {name!r} is a {type(pattern).__name__}: give an offset such as 2, "
                "or a function (i, j, ids) -> bool"
            )


def _distribution(values: np.ndarray) -> dict[str, np.ndarray]:
    import warnings

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
