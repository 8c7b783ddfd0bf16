"""Prove by a replay which rows of a module's weights make its queries and keys."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from stabmon._torch.snippets import QK_NORM
from stabmon.interventions.run.score_replay import replayed_scores
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.head_rows import QueryKey
from stabmon.projections.not_applicable import NotApplicable
from stabmon.projections.scaling import ScaledRows


def proven_rows(
    run: TrainingRun,
    name: str,
    proposals: Sequence[QueryKey],
    factors: Mapping[int, float],
    before: np.ndarray,
) -> QueryKey:
    """Return the first proposal that scales a module's scores as predicted.

    Args:
        run: the run, with a forward to repeat.
        name: the module's name.
        proposals: guesses of the rows that make its queries and keys.
        factors: the factor to try on each head's scores, by head.
        before: ``[H]`` scores before, of the same forward.

    Raises:
        NotApplicable: if no proposal does, with the difference of each.
    """
    weight = next(iter(run.module(name).parameters()), None)
    is_exact = weight is None or weight.dtype in (torch.float32, torch.float64)
    tolerance = 0.01 if is_exact else 0.03
    failures = []
    for proposal in proposals:
        trial = ScaledRows(run)
        trial.scale(proposal.edits(dict(factors)))
        try:
            after = replayed_scores(run)[name]
        finally:
            trial.undo()
        wrong = _difference(factors, before, after, tolerance, proposal.shared)
        if not wrong:
            return proposal
        failures.append(f"{proposal.how}: {wrong}")
    raise NotApplicable(
        f"scaling weights does not scale the scores of {name} ({'; '.join(failures)})", QK_NORM
    )


def _difference(
    factors: Mapping[int, float],
    before: np.ndarray,
    after: np.ndarray,
    tolerance: float,
    shared: bool,
) -> str:
    """Describe how a module's scores differ from the predicted; empty if not.

    Args:
        factors: the factor on each head's scores, by head.
        before: ``[H]`` scores before.
        after: ``[H]`` scores after.
        tolerance: largest relative difference.
        shared: all heads are scaled by the smallest factor.
    """
    factor = np.array(
        [min(factors.values()) if shared else factors.get(head, 1.0) for head in range(len(before))]
    )
    counts = np.isfinite(before)
    error = np.where(
        counts, np.abs(after - factor * before) / np.maximum(np.abs(factor * before), 1e-6), 0.0
    )
    worst = int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
    if error[worst] <= tolerance:
        return ""
    return f"head {worst} came to {after[worst]:.4g} instead of {(factor * before)[worst]:.4g}"
