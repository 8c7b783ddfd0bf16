"""Keep the largest scores of the newest steps, each scaled to the present weights."""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from stabmon._torch.tensors import is_sharded
from stabmon.projections.head_rows import QueryKey, Rows

STEPS = 8
"""Newest steps that count. Of the heads of a small Llama, held at a target while Muon made their
scores 3% larger a step, some were seen above 1.3 times the target in 4 of 200 steps where the
newest step alone counted, and in none with eight."""


class RecentScores:
    """Largest scores of the newest steps, scaled to the present weights.

    A batch is small, so that its largest score may be well below or above that of other batches
    under the same weights: a head that is clipped by the newest alone is found far above its target
    by another batch some steps later. Clips count as changes of the norms.
    """

    def __init__(self) -> None:
        self._kept: dict[str, deque[np.ndarray]] = {}
        self._kept_norms: dict[str, Tensor] = {}
        """Norms of the weights that a layer's kept scores belong to."""
        self._seen: dict[str, Tensor] = {}
        """Norms of the weights that this step's forward was made with."""

    def note_weights(self, layer: str, parts: QueryKey) -> None:
        """Note the weights in a training forward of a layer; sharded weights are left out.

        Args:
            layer: the layer that attends.
            parts: the rows that make its queries and keys.
        """
        if layer not in self._seen and not any(
            is_sharded(rows.parameter) for rows in parts.query[0]
        ):
            self._seen[layer] = _norms(parts)

    def add(
        self, scores: Mapping[str, np.ndarray], parts: Mapping[str, QueryKey]
    ) -> dict[str, np.ndarray]:
        """Add a step's largest scores, after the optimizer has stepped.

        Args:
            scores: ``[n]`` of the first n heads, by layer.
            parts: the rows that make queries and keys, by layer.

        Returns:
            The largest of the newest steps, as they would be with the present weights. A new score
            that is not finite stays as it is.
        """
        seen, self._seen = self._seen, {}
        layers = [layer for layer in scores if layer in seen and layer in parts]
        if not layers:
            return dict(scores)
        now = {layer: _norms(parts[layer]) for layer in layers}
        ratios = [_ratio(seen[layer], self._kept_norms.get(layer, seen[layer])) for layer in layers]
        ratios += [_ratio(now[layer], seen[layer]) for layer in layers]
        sizes = [len(each) for each in ratios]
        host = [
            part.numpy()
            for part in torch.cat([each.to(ratios[0].device) for each in ratios])
            .double()
            .cpu()
            .split(sizes)
        ]
        self._kept_norms |= now
        found = dict(scores)
        for layer, since, step in zip(
            layers, host[: len(layers)], host[len(layers) :], strict=True
        ):
            new, n = scores[layer], len(scores[layer])
            old = [each * since[:n] for each in self._kept.get(layer, ())]
            together = [
                each * step[:n] for each in (*old, np.where(np.isfinite(new), new, -np.inf))
            ]
            self._kept[layer] = deque(together, maxlen=STEPS)
            found[layer] = np.where(np.isfinite(new), np.max(self._kept[layer], axis=0), new)
        return found


def _ratio(now: Tensor, before: Tensor) -> Tensor:
    return torch.where((before > 0) & torch.isfinite(now / before), now / before, 1.0)


@torch.no_grad()
def _norms(parts: QueryKey) -> Tensor:
    """Return ``[H]`` norms of each head's query rows, times those of own key rows."""
    query = _norms_of(parts.query)
    return query if parts.key is None else query * _norms_of(parts.key)


def _norms_of(heads: Sequence[Sequence[Rows]]) -> Tensor:
    """Return ``[H]`` norms of each head's rows, all parts of a head together."""
    views = []
    for rows in heads:
        for each in rows:
            view = each.view(each.parameter).detach().float()
            views.append(view + each.offset if each.offset else view)
    # torch._foreach_norm: one call for all tensors (checked with torch 2.13)
    norms = torch.stack(list(torch._foreach_norm(views))).split([len(rows) for rows in heads])
    if all(len(each) == 1 for each in norms):
        return torch.cat(norms)
    return torch.stack([torch.linalg.vector_norm(each) for each in norms])
