"""Detect that scaled rows of weights do not make the scores of their heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.head_rows import Rows

SHRUNK = 1 / 8
"""Share of their norm at which rows must have lowered their head's score.

Between batches a score differs by less.
"""
FORWARDS = 3
"""Number of training forwards in a row that must show the same."""


class UnprovenRows:
    """Rows scaled without a proof, compared with the scores of their heads.

    One batch's scores differ from another's, so that no single clip is judged by them; rows at an
    eighth of their norm are.

    Args:
        run: the run.
        rows: the rows that are about to be scaled.
        scores: the largest score of each of their heads before, by head.
    """

    def __init__(self, run: TrainingRun, rows: Sequence[Rows], scores: Mapping[int, float]) -> None:
        self.run, self._rows = run, list(rows)
        self._first = self._norms()
        self._scores = dict(scores)
        self._times = 0

    def judge(
        self, scores: Mapping[int, float]
    ) -> Literal["unknown", "fell", "doubtful", "ineffective"]:
        """Judge the rows by a step's forwards; all ranks must call this.

        Args:
            scores: the largest score of each head, by head.

        Returns:
            "fell" once a score is below half of the largest seen so far; "ineffective" once the
            rows have shrunk and ``FORWARDS`` forwards have shown no score that fell; "doubtful"
            before these are enough; else "unknown".
        """
        highest = {
            head: max(score, self._scores.get(head, score)) for head, score in scores.items()
        }
        self._scores |= highest
        if any(score < highest[head] / 2 for head, score in scores.items()):
            return "fell"
        if not scores or not self._have_shrunk():
            self._times = 0
            return "unknown"
        self._times += 1
        return "ineffective" if self._times >= FORWARDS else "doubtful"

    def _have_shrunk(self) -> bool:
        left = torch.where(self._first > 0, self._norms() / self._first, 0.0)
        if self.run.share.is_staged:  # other stages lack these rows, and do not come here
            return bool(left.max().item() <= SHRUNK)
        return bool(self.run.largest_over_ranks(left.max().reshape(1)).item() <= SHRUNK)

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        """Return the norm of this rank's part of each range, which may be empty."""
        return torch.stack(
            [rows.view(rows.parameter).detach().float().norm() for rows in self._rows]
        )
