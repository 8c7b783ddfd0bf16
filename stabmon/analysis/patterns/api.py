"""Entry point of attention patterns: statistics, roles, insights, tested advice."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from stabmon.analysis.call_facts import reads_other_sequence, token_ids
from stabmon.analysis.compression.advice import compression_advice
from stabmon.analysis.forward import run_model
from stabmon.analysis.patterns.head_roles import head_roles
from stabmon.analysis.patterns.insights import find_insights
from stabmon.analysis.patterns.layer_scan import LayerScan, is_causal_call, scan_layer
from stabmon.analysis.patterns.maps import AttentionMaps, pooled_map
from stabmon.analysis.patterns.result import AttentionPatterns
from stabmon.analysis.patterns.role_masses import RolePattern
from stabmon.analysis.patterns.similarity import layer_similarity
from stabmon.analysis.rollout.stacks import CallReader
from stabmon.operator import AttentionOperator
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall

ADVICE_WEIGHTS = 1 << 28
"""Largest number of attention weights per forward, over all layers, for advice.

With more, advice must be requested.
"""
__all__ = ["AttentionPatterns", "attention_patterns"]


def attention_patterns(
    model: nn.Module,
    batch: Any,
    *,
    query: int = -1,
    attention_layer_pattern: str | None = None,
    custom_roles: Mapping[str, RolePattern] | None = None,
    similarity: bool = True,
    advice: bool | None = None,
    loss_fn: Callable[[Any, Any], Tensor] | None = None,
    map_size: int | None = None,
    attention_modules: tuple[str, ...] = (),
) -> AttentionPatterns:
    """Measure the attention patterns of every layer and head of a model on a batch.

    One forward, and one pass over each layer's rows in memory linear in the length. ``similarity``
    keeps queries and keys of all layers and passes over them again; ``advice`` costs up to two
    dozen more forwards.

    Args:
        model: any model; left as it was.
        batch: the input of its forward: a mapping of arguments, a tuple of them, or one tensor.
        query: the query of ``statistics``: from 0 on a column of the batch, padding included;
            below 0 counted from the end of each sample's own tokens, whatever the padding's side.
        attention_layer_pattern: regular expression that a layer's name must contain.
        custom_roles: name -> an offset k (key i - k), or a function (i, j, ids) -> bool of query
            positions ``[rows, 1]``, key positions ``[1, cols]`` and token ids ``[B, K]`` or None.
        similarity: True to compare the layers' maps.
        advice: True to measure ways of compressing a causal language model's KV cache; None for
            the same unless the model forms more than 2.7e8 attention weights in a forward (16
            layers of 16 heads at 1024 tokens), which would take long.
        loss_fn: (output, batch) -> loss of each token ``[B, S]`` or of each sample ``[B]`` in
            nats, for ``advice``; by default the next token's cross-entropy.
        map_size: take maps of the first sample too, pooled to this many pixels per side at most.
        attention_modules: patterns of modules whose hand-written softmax is attention.

    Returns:
        The patterns.

    Raises:
        ValueError: if no attention is found, no layer matches, no sample has such a query, or a
            custom role is of another kind.

    Example:
        >>> import torch
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
    weights = 0
    own_ids, decoder_ids = token_ids(model, batch)
    padding: dict[tuple[int, int], Tensor] = {}

    reader = CallReader(model)

    def measure(call: AttentionCall) -> None:
        nonlocal weights
        attention = operator_of(call)
        weights += attention.batch * attention.heads * attention.queries * attention.keys
        is_cross = reads_other_sequence(call, reader)
        size = attention.batch, attention.queries
        valid = attention.is_counted.any(1)
        if is_cross:  # its padded queries are only known from the self-attention before it
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
        measure,
        pattern=attention_layer_pattern,
        attention_modules=attention_modules,
    )
    if all((positions < 0).all() for positions in found.positions.values()):
        raise ValueError(f"query {query}: no sample has such a query; give -1 for the last token")
    if not found.roles:
        found.notes.append("no head roles: too few queries see at least 4 keys; give a longer text")
    seen_ids = own_ids is not None or decoder_ids is not None
    if not seen_ids:
        found.notes.append("the batch has no token ids: induction and duplicates not testable")
    compared = layer_similarity(kept, valid_of) if kept else None
    kept.clear()
    found = replace(found, similarity=compared, maps=maps if map_size is not None else None)
    found.insights.extend(
        find_insights(found.over_queries, found.queries, found.kinds, found.similarity)
    )
    if advice is None and weights > ADVICE_WEIGHTS:
        found.notes.append(
            f"no compression advice: {weights:.2g} attention weights per forward are many for its "
            f"two dozen forwards (limit {ADVICE_WEIGHTS:.2g}); request it with advice=True"
        )
    elif advice is not False:
        _add_advice(found, model, batch, loss_fn, asked=bool(advice))
    return found


def _add_advice(
    found: AttentionPatterns, model: nn.Module, batch: Any, loss_fn: Any, *, asked: bool
) -> None:
    """Add advice; note a failure unless the advice was requested."""
    try:
        advised = compression_advice(model, batch, loss_fn=loss_fn)
    except RuntimeError as error:  # of torch: a kernel that cannot be rebuilt, or no memory left
        if asked:
            raise
        reason = " ".join(str(error).split())[:160]
        found.notes.append(f"no compression advice: measuring it failed ({reason})")
        return
    found.recommendations.extend(advised.recommendations)
    found.rejected.extend(advised.rejected)
    found.notes.extend(advised.notes)


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
