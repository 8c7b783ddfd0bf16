"""A rule: heads that attend to all keys alike, reading after reading."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from stabmon.records import StabilityIssue
from stabmon.rules.base import Rule
from stabmon.rules.symptoms import Symptom
from stabmon.rules.tracking.history import History

UNIFORM = Symptom(
    "uniform",
    "see that scores are scaled by 1/sqrt(head_dim), and that W_q and W_k are not decayed to 0",
    order=60,
)
"""Interventions treat it by this name; one of stabmon.rules.symptoms would do as well."""


@dataclass(frozen=True)
class UniformAttention(Rule):
    """Report heads whose rows stay uniform.

    Every head of a fresh model is nearly uniform, so that only heads that have stayed so for
    ``readings`` readings are reported.
    """

    symptom: ClassVar[Symptom] = UNIFORM

    above: float = 0.995
    """Normalised entropy, in [0, 1], above which a head is uniform."""
    readings: int = 3
    """Readings in a row."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return one issue per head; ``value`` is its normalised entropy."""
        if len(history) < self.readings:
            return
        entropy = history.signal("normalized_entropy")[-self.readings :]
        for n in np.flatnonzero((entropy > self.above).all(axis=0)).tolist():
            layer, head = history.heads[n]
            yield StabilityIssue(
                step=history.latest.step,
                layer=layer,
                head=head,
                issue_type="uniform_attention",
                severity="error",
                value=float(entropy[-1, n]),
                threshold=self.above,
                suggestion="Lower the weight decay of W_q and W_k.",
                evidence={"readings": self.readings},
            )
