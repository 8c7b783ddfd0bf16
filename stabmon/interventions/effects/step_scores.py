"""Largest scores of a step's forwards, over micro-batches and ranks."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from stabmon.interventions.effects.effect import Place
from stabmon.interventions.effects.head_factors import layers_of
from stabmon.interventions.run.training_run import TrainingRun


class StepScores:
    """The largest score of each head of some layers in the step in progress.

    Args:
        run: the run.

    Example:
        >>> scores = StepScores(TrainingRun(None))
        >>> scores.note("attn", torch.tensor([1.0, 5.0]))
        >>> scores.note("attn", torch.tensor([2.0, 3.0]))
        >>> scores.take({("attn", 1): 4.0})
        {'attn': array([2., 5.])}
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self._seen: dict[str, Tensor] = {}

    def note(self, layer: str, scores: Tensor) -> None:
        """Note a forward's scores.

        Args:
            layer: the layer's name.
            scores: ``[H]``, the largest of each head.
        """
        known = self._seen.get(layer)
        self._seen[layer] = scores if known is None else torch.maximum(known, scores)

    def take(self, targets: Mapping[Place, float]) -> dict[str, np.ndarray]:
        """Return the largest scores by layer over all ranks, which must all call this; forget them.

        Args:
            targets: the layers and heads to return; the same on all ranks.
        """
        seen, self._seen = self._seen, {}
        layers = sorted(layers_of(targets))
        heads = [1 + max(head or 0 for layer, head in targets if layer == name) for name in layers]
        device = next((each.device for each in seen.values()), torch.device("cpu"))
        unseen = torch.full((max(heads),), -torch.inf, device=device)
        flat = [
            seen[name][:n].float() if name in seen else unseen[:n]
            for name, n in zip(layers, heads, strict=True)
        ]
        together = self.run.largest_over_ranks(torch.cat(flat)).double().cpu()
        return {
            name: part.numpy() for name, part in zip(layers, together.split(heads), strict=True)
        }

    def agreed(
        self, own: Mapping[str, np.ndarray], targets: Mapping[Place, float]
    ) -> dict[str, np.ndarray]:
        """Return the largest of all ranks' measured scores, for all to scale alike.

        Args:
            own: ``[H]`` scores that this rank has measured, by layer.
            targets: the layers and heads, the same on all ranks.
        """
        if self.run.ranks == 1:
            return dict(own)
        device = next(self.run.model.parameters()).device
        self._seen = {
            layer: torch.tensor(scores, dtype=torch.float32, device=device)
            for layer, scores in own.items()
        }
        return self.take(targets)
