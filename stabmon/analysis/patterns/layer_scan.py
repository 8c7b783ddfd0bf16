"""Measurement of one attention call in one pass over its rows, in linear memory."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from stabmon.analysis.dtypes import compute_dtype, sum_dtype
from stabmon.analysis.patterns.context_rows import (
    first_keys,
    mass_at,
    mean_distance,
    own_positions,
    query_statistics,
    row_sums,
    visible_keys,
    without_own,
)
from stabmon.analysis.patterns.role_masses import RoleMasses, RolePattern
from stabmon.operator import AttentionOperator

OVER_QUERIES = (
    "entropy",
    "normalized_entropy",
    "sink_mass",
    "mean_distance",
    "recent_distant_ratio",
    "context_mass",
)
"""Statistics averaged over all valid queries with a context."""


@dataclass(frozen=True, eq=False)
class LayerScan:
    """Results of one pass over a layer, float64 on the CPU.

    B samples, H heads, K keys.
    """

    is_cross: bool
    is_causal: bool
    positions: Tensor
    """Row of the chosen query, ``[B]`` int64; -1 in samples without it."""
    statistics: dict[str, Tensor]
    """Statistics of the chosen query, ``[B, H]`` each."""
    over_queries: dict[str, Tensor]
    """Means over all valid queries, ``[B, H]`` each."""
    queries: Tensor
    """Number of valid queries with at least two context keys, ``[B]`` int64."""
    row: Tensor
    """Weights of the query, its own key included, ``[B, H, K]``."""
    received: Tensor
    """Weights received by each key, summed over valid queries, ``[B, H, K]``."""
    seen_by: Tensor
    """Number of valid queries for each key, the most of any head, ``[B, K]`` int64."""
    roles: RoleMasses | None


def chosen_queries(valid: Tensor, query: int) -> Tensor:
    """Return the row of each sample's query, ``[B]`` int64; -1 in samples without it.

    Args:
        valid: ``[B, Q]`` bool, rows that are no padding.
        query: from 0 on a column of the batch, padding included; below 0 counted from the end of
            the sample's own queries, so that -1 is the last whatever the padding's side.

    Example:
        >>> valid = torch.tensor([[False, True, True, True], [True, True, False, False]])
        >>> chosen_queries(valid, -1).tolist(), chosen_queries(valid, 2).tolist()
        ([3, 1], [2, -1])
    """
    places = torch.arange(valid.shape[1], device=valid.device)
    if query >= 0:
        hit = valid & (places == query)
    else:
        left = valid.flip(-1).cumsum(-1).flip(-1)
        hit = valid & (left == -query)
    return torch.where(hit.any(-1), hit.int().argmax(-1), -1)


def is_causal_call(attention: AttentionOperator) -> bool:
    """Return whether no query sees a later key, by flag or by mask."""
    visibility = attention.visibility
    if visibility.is_causal:
        return True
    summary = visibility.summary
    if summary is None or summary.last.shape[-1] != attention.queries:
        return attention.queries == 1 < attention.keys
    own = own_positions(attention, slice(0, attention.queries))
    return bool((summary.last <= own).all())


def scan_layer(
    attention: AttentionOperator,
    *,
    valid: Tensor,
    query: int = -1,
    is_cross: bool = False,
    ids: Tensor | None = None,
    custom_roles: Mapping[str, RolePattern] | None = None,
    roles: bool = True,
    elements: int = 1 << 21,
) -> LayerScan:
    """Measure an operator in one pass over its rows.

    Args:
        attention: the operator of one call.
        valid: ``[B, Q]`` bool, queries that count.
        query: see :func:`chosen_queries`.
        is_cross: True if the keys are of another sequence.
        ids: ``[B, K]`` token ids of the keys.
        custom_roles: further roles to measure.
        roles: True to measure roles at all.
        elements: weights in one block.

    Returns:
        The layer's measurements.
    """
    a, device = attention, attention.query.device
    is_causal = not is_cross and is_causal_call(a)
    masses = None
    if roles:
        masses = RoleMasses(
            a,
            valid,
            is_cross=is_cross,
            is_causal=is_causal,
            ids=ids,
            custom=custom_roles or {},
        )
    first = first_keys(a)
    positions = chosen_queries(valid, query)
    chosen = positions.tolist()
    exact, kind = sum_dtype(a.query), compute_dtype(a.query)
    row = torch.zeros(a.batch, a.heads, a.keys, dtype=kind, device=device)
    received = torch.zeros(a.batch, a.heads, a.keys, dtype=exact, device=device)
    seen_by = torch.zeros(a.batch, a.keys, dtype=torch.int64, device=device)
    rows_of = _Rows(a.batch, a.heads, exact, device)
    for block in a.row_blocks(elements):
        rows, cols, p = block.rows, block.cols, block.probabilities
        if cols.stop <= cols.start:
            continue
        aligned = own_positions(a, rows)
        own = None if is_cross else aligned
        visible = visible_keys(a, rows, cols)
        context = without_own(visible, own, cols)
        found = row_sums(p, context, own, cols)
        found["sink_mass"] = mass_at(p, first, cols)
        found["mean_distance"] = mean_distance(p, own, cols, is_causal=is_causal)
        spread = found.pop("spread")
        counts = valid[:, rows]
        rows_of.add(found, counts)
        weights = p if bool(counts.all()) else p.masked_fill(~counts[:, None, :, None], 0.0)
        received[:, :, cols] += weights.sum(2).to(exact)
        seen = visible & counts[:, None, :, None]
        seen_by[:, cols] += seen.sum(2).amax(1)
        for sample, position in enumerate(chosen):
            if rows.start <= position < rows.stop:
                row[sample, :, cols] = p[sample, :, position - rows.start]
        if masses is not None:
            masses.add(p, visible, rows, cols, spread, aligned)
    if masses is not None:
        masses.to_host()
    asked = _of_query(a, row, positions, first, is_cross)
    return LayerScan(
        is_cross,
        is_causal,
        positions.cpu(),
        {name: value.double().cpu() for name, value in asked.items()},
        {name: value.double().cpu() for name, value in rows_of.means().items()},
        rows_of.queries.amax(1).cpu(),
        row.cpu(),
        received.cpu(),
        seen_by.cpu(),
        masses,
    )


def _of_query(
    a: AttentionOperator, row: Tensor, positions: Tensor, first: Tensor, is_cross: bool
) -> dict[str, Tensor]:
    """Return statistics ``[B, H]`` of each sample's query; NaN in samples without it."""
    parts: list[dict[str, Tensor]] = []
    everything = slice(0, a.keys)
    for sample, position in enumerate(positions.tolist()):
        one = slice(max(position, 0), max(position, 0) + 1)
        own = None if is_cross else own_positions(a, one)
        visible = visible_keys(a, one, everything)
        context = without_own(visible, own, everything)
        context = context[sample : sample + 1] if len(context) > 1 else context
        p = row[sample, None, :, None].to(sum_dtype(row))
        found = query_statistics(p, context)
        found["sink_mass"] = mass_at(p, first[sample : sample + 1], everything)
        found["mean_distance"] = mean_distance(p, own, everything, is_causal=False)
        values = {name: value[0, :, 0] for name, value in found.items()}
        if position < 0:
            values = {n: torch.full_like(v.to(p.dtype), torch.nan) for n, v in values.items()}
        parts.append({name: value.to(p.dtype) for name, value in values.items()})
    return {name: torch.stack([part[name] for part in parts]) for name in parts[0]}


class _Rows:
    """Sums of row statistics over the valid queries with at least two context keys."""

    def __init__(self, batch: int, heads: int, exact: torch.dtype, device: torch.device) -> None:
        self._sums: dict[str, Tensor] = {}
        self._zero = torch.zeros(batch, heads, dtype=exact, device=device)
        self.queries = torch.zeros(batch, heads, dtype=torch.int64, device=device)

    def add(self, found: dict[str, Tensor], counts: Tensor) -> None:
        counted = counts[:, None] & (found["context_size"] >= 2)
        self.queries += counted.sum(-1)
        found = found | {"recent_distant_ratio": found["recent"] / found["distant"]}
        for name, value in found.items():
            kept = torch.where(counted, value, 0.0).sum(-1, dtype=self._zero.dtype)
            self._sums[name] = self._sums.get(name, self._zero) + kept

    def means(self) -> dict[str, Tensor]:
        sums = {name: self._sums.get(name, self._zero) for name in (*OVER_QUERIES, *_POOLED)}
        means = {name: sums[name] / self.queries for name in OVER_QUERIES}
        means["recent_share"] = sums["recent"] / (sums["recent"] + sums["distant"])
        means["pooled_recent_distant_ratio"] = sums["recent"] / sums["distant"]
        means["clustering"] = sums["neighbours"] / sums["squares"]
        means["context_size"] = sums["context_size"] / self.queries
        return means


_POOLED = ("recent", "distant", "neighbours", "squares", "context_size")
