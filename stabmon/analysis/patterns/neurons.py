"""Contribution of each feature of query and key to one attention score."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from stabmon.analysis.forward import run_model
from stabmon.analysis.patterns.layer_scan import chosen_queries
from stabmon.analysis.record import AnalysisRecord
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall


@dataclass(frozen=True, eq=False)
class ScoreContributions:
    """Scores of one query with one key, feature by feature; H query heads, D features.

    Attributes:
        layer, sample, query: the layer's name, the sample, and the query's row.
        keys: ``[H]``, index of each head's key.
        contributions: ``[H, D]`` float64, scale * q_d * k_d, after rotary embeddings and
            normalisation of queries and keys.
        scores: ``[H]``, their sums: the score before soft cap, bias and mask.
        weights: ``[H]``, the attention weight between query and key.
        top: per head (feature, contribution), the largest in size first.

    Example:
        >>> one, parts = np.ones(1), np.array([[0.25, 0.75]])
        >>> found = ScoreContributions("h.0", 0, 3, one, parts, parts.sum(1), one, [[(1, 0.75)]])
        >>> found.to_record().values["top"]
        [[[1, 0.75]]]
    """

    layer: str
    sample: int
    query: int
    keys: np.ndarray
    contributions: np.ndarray
    scores: np.ndarray
    weights: np.ndarray
    top: list[list[tuple[int, float]]]

    def to_record(self) -> AnalysisRecord:
        """Return a record of kind ``neurons``.

        Values: ``layer``, ``sample``, ``query``, ``top`` ([[feature, contribution], …] a head).
        Arrays: ``keys``, ``scores``, ``weights`` ``[H]`` and ``contributions`` ``[H, D]``.
        """
        values: dict[str, Any] = {"layer": self.layer, "sample": self.sample, "query": self.query}
        values["top"] = [[list(pair) for pair in pairs] for pairs in self.top]
        names = ("keys", "scores", "weights", "contributions")
        return AnalysisRecord("neurons", values, {name: getattr(self, name) for name in names})


def score_contributions(
    model: nn.Module,
    batch: Any,
    *,
    layer: str,
    query: int = -1,
    key: int | None = None,
    sample: int = 0,
    top: int = 10,
) -> ScoreContributions:
    """Split the scores of one query and key into the products of their features.

    Args:
        model: any model.
        batch: the input of its forward.
        layer: regular expression contained in exactly one layer's name.
        query: from 0 on a column of the batch; below 0 counted from the sample's own last token.
        key: index of the key, from the end below 0; None for each head's strongest.
        sample: index of the sample in the batch.
        top: number of features to list.

    Returns:
        The contributions.

    Raises:
        ValueError: if no layer or several match, there is no such sample, query or key, or the
            model forms its scores itself, without visible queries and keys.

    Example:
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> found = score_contributions(layer, torch.randn(1, 5, 8), layer="self_attn", key=0)
        >>> found.contributions.shape, bool((found.contributions.sum(1) == found.scores).all())
        ((2, 4), True)
    """
    found: list[ScoreContributions] = []

    def split(call: AttentionCall) -> None:
        if found:
            raise ValueError(
                f"layer {layer!r} matches {found[0].layer} and {call.layer}: name one of them"
            )
        found.append(_contributions(call, query, key, sample, top))

    run_model(model, batch, split, pattern=layer)
    return found[0]


def _contributions(
    call: AttentionCall, query: int, key: int | None, sample: int, top: int
) -> ScoreContributions:
    if call.query is None or call.key is None:
        raise ValueError(f"{call.layer} forms its scores itself: its queries and keys are not seen")
    a = operator_of(call)
    if not -a.batch <= sample < a.batch:
        raise ValueError(f"sample {sample}: {call.layer} has {a.batch} samples")
    sample %= a.batch
    row = int(chosen_queries(a.is_counted.any(1), query)[sample])
    if row < 0:
        raise ValueError(f"query {query}: sample {sample} of {call.layer} has none such")
    cols, weights = a.probabilities_of(slice(row, row + 1), slice(sample, sample + 1))
    full = torch.zeros(a.heads, a.keys, dtype=weights.dtype, device=weights.device)
    full[:, cols] = weights[0, :, 0]
    if key is not None and not -a.keys <= key < a.keys:
        raise ValueError(f"key {key}: {call.layer} has {a.keys} keys")
    keys = full.argmax(-1) if key is None else torch.full((a.heads,), key % a.keys)
    keys = keys.to(full.device)
    heads = torch.arange(a.heads, device=full.device)
    groups = a.heads // a.key_heads
    q = a.query[sample, :, row].cpu().double()
    k = a.key[sample, heads // groups, keys].cpu().double()
    parts = (a.scale * q * k).numpy()
    order = np.argsort(-np.abs(parts), axis=-1)[:, :top]
    listed = [[(int(d), float(parts[h, d])) for d in order[h]] for h in range(a.heads)]
    return ScoreContributions(
        call.layer,
        sample,
        row,
        keys.cpu().numpy(),
        parts,
        parts.sum(-1),
        full[heads, keys].cpu().double().numpy(),
        listed,
    )
