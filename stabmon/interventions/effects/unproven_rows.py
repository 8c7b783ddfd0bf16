"""Rows that were scaled without a proof that they make a head's scores: what shows in time that
they do not.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Literal

import torch

from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.head_rows import Rows

SHRUNK = 1 / 8
"""Share of their norm to which rows have come that cannot have left a score where it was: of
another batch it may differ by less.
"""
FORWARDS = 3
"""Training forwards that must show the same."""


class Unproven:
    """Compares what is left of rows with what is left of their heads' scores, over as long as it
    takes.

    One batch's scores differ from another's, so that no single clip is judged by them; rows at an
    eighth of their norm are.

    Args:
        run: the run.
        rows: what is about to be scaled.
        scores: the largest score of each head that they are to make, before.
    """

    def __init__(self, run: TrainingRun, rows: Sequence[Rows], scores: Mapping[int, float]) -> None:
        self.run, self._rows = run, list(rows)
        self._first = self._norms()
        self._scores = dict(scores)
        self._times = 0

    def judge(
        self, scores: Mapping[int, float]
    ) -> Literal["unknown", "fell", "doubtful", "in vain"]:
        """Take the largest scores of a step's forwards, by head; all ranks must call this.

        Returns:
            "fell" once a score has come to half of the largest seen so far, "in vain" once the rows
            have shrunk and enough forwards have shown that no score has fallen, "doubtful" before
            it is enough.
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
        return "in vain" if self._times >= FORWARDS else "doubtful"

    def _have_shrunk(self) -> bool:
        left = torch.where(self._first > 0, self._norms() / self._first, 0.0)
        return bool(self.run.largest_over_ranks(left.max().reshape(1)).item() <= SHRUNK)

    @torch.no_grad()
    def _norms(self) -> torch.Tensor:
        """Of what is here of each range; a rank may hold nothing of it."""
        return torch.stack(
            [rows.view(rows.parameter).detach().float().norm() for rows in self._rows]
        )
