"""Replay the newest step's batch, to measure the scores after an intervention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from stabmon._torch.forward_call import is_split
from stabmon.capture import AttentionCapture
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall


def can_replay(run: TrainingRun) -> bool:
    """Return whether there is a forward to repeat, and one process can do so alone."""
    return bool(run.forwards) and not is_split(run.model)


def replay(run: TrainingRun, on_call: Callable[[AttentionCall], None]) -> None:
    """Repeat the newest step's first forward, and report its attention.

    Args:
        run: the run, with a forward to repeat.
        on_call: called with every attention call, under the name that all ranks use.
    """
    share = run.share

    def named(call: AttentionCall) -> None:
        on_call(replace(call, layer=share.common(call.layer)) if share.prefix else call)

    with (
        run.forwards[0].again(run.model) as forward,
        AttentionCapture(run.model, named, always_watch_functions=True),
    ):
        forward()


def deepest_first(layers: Sequence[str], seen: Sequence[str]) -> list[str]:
    """Sort layers so that a change of one affects none of the later ones.

    Args:
        layers: some layers.
        seen: all layers in the order in which they attend; a layer that is not among them comes
            first.

    Example:
        >>> deepest_first(["a", "c"], ["a", "b", "c"])
        ['c', 'a']
    """
    return sorted(layers, key=lambda layer: -seen.index(layer) if layer in seen else -len(seen))


def replayed_scores(run: TrainingRun) -> dict[str, np.ndarray]:
    """Return the largest score of each head, ``[H]`` by layer, without position bias.

    Empty where nothing can be replayed.
    """
    if not can_replay(run):
        return {}
    found: dict[str, np.ndarray] = {}

    def measure(call: AttentionCall) -> None:
        found[call.layer] = largest_scores(call).double().cpu().numpy()

    replay(run, measure)
    return found


def largest_scores(call: AttentionCall) -> Tensor:
    """Return ``[H]`` largest scores of the heads, before softcap and position bias.

    -inf for a head whose rows see nothing.
    """
    operator = operator_of(call)
    if operator.visibility.is_bias and call.mask is not None and call.query is not None:
        summary = operator.visibility.summary
        assert summary is not None
        operator = operator_of(replace(call, mask=call.mask > summary.floor))
    rows = operator.max_score()
    return torch.where(rows.isnan(), torch.inf, rows).amax(dim=(0, 2))
