"""Run the newest step's batch again, without a trace, to see what an intervention has really done
to the scores.
"""

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
    """Whether there is a forward to repeat, and one process can do so by itself."""
    return bool(run.forwards) and not is_split(run.model)


def replay(run: TrainingRun, on_call: Callable[[AttentionCall], None]) -> None:
    """Show ``on_call`` every attention call of the newest step's first forward, on the parameters
    as they are now.
    """
    with (
        run.forwards[0].again(run.model) as forward,
        AttentionCapture(run.model, on_call, always_watch_functions=True),
    ):
        forward()


def deepest_first(layers: Sequence[str], seen: Sequence[str]) -> list[str]:
    """The layers in the order in which each can be changed and judged without those still to come
    seeing anything of it.

    Args:
        layers: some layers.
        seen: all layers in the order in which they attend; a layer that is not among them comes
            first.
    """
    return sorted(layers, key=lambda layer: -seen.index(layer) if layer in seen else -len(seen))


def replayed_scores(run: TrainingRun) -> dict[str, np.ndarray]:
    """The largest score of each head, ``[H]`` by layer, without position bias; empty where nothing
    can be replayed.
    """
    if not can_replay(run):
        return {}
    found: dict[str, np.ndarray] = {}

    def look(call: AttentionCall) -> None:
        found[call.layer] = largest_scores(call).double().cpu().numpy()

    replay(run, look)
    return found


def largest_scores(call: AttentionCall) -> Tensor:
    """``[H]`` largest score of each head, before softcap and position bias; -inf for a head whose
    rows see nothing.
    """
    operator = operator_of(call)
    if operator.visibility.is_bias and call.mask is not None and call.query is not None:
        summary = operator.visibility.summary
        assert summary is not None
        operator = operator_of(replace(call, mask=call.mask > summary.floor))
    rows = operator.max_score()
    return torch.where(rows.isnan(), torch.inf, rows).amax(dim=(0, 2))
