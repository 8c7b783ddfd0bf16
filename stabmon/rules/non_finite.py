"""NaN or inf has come up: name the tensor it started in."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np

from stabmon.records import NonFinite as Finding
from stabmon.records import Severity, StabilityIssue
from stabmon.rules.base import rule
from stabmon.rules.history import History

ROLL_BACK = (
    "Skip this step, go back to the last good checkpoint (about 100 steps) and skip the batches in between; then mend what "
    "made it: a NaN that has reached the parameters stays in them"
)
SCALER = (
    "With a gradient scaler single overflows are part of its search and it skips them; if they go on, lower the rate or clip "
    "gradients"
)


@rule
@dataclass(frozen=True)
class NonFinite:
    """A NaN or inf in a parameter, input, activation, score, gradient or loss: nothing after it can be trusted.

    Three witnesses, the most exact first: the first bad tensor, where the monitor has traced it; a head whose largest score is
    infinite; a loss that is NaN or inf. The trace wins over the other two, so that one accident is one issue. A bad gradient
    alone is a warning at first, because a gradient scaler makes and skips such steps by design; it is critical once it stays.
    """

    gradient_readings: int = 3
    """Readings in a row with a bad gradient, and nothing else bad, from which it no longer passes for a scaler's search."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue at the first bad tensor, or at each head with an infinite score, or one for the run; never for a NaN score
        alone, which also means that no row was measured."""
        reading = history.latest
        if reading.non_finite is not None:
            return [self._traced(history, reading.non_finite)]
        bad_heads = np.flatnonzero(np.isposinf(history.now("max_logit")))
        if len(bad_heads):
            return [self._issue(reading.step, *history.heads[n], "score", np.inf) for n in bad_heads]
        losses = reading.losses or (((reading.step, reading.loss),) if reading.loss is not None else ())
        for step, loss in losses:
            if not math.isfinite(loss):
                return [self._issue(step, None, None, "loss", loss)]
        gradient = reading.gradients.get("", 0.0)
        if not math.isfinite(gradient):
            return [self._issue(reading.step, None, None, "gradient", gradient, self._gradient_severity(history))]
        return []

    def _traced(self, history: History, found: Finding) -> StabilityIssue:
        severity = self._gradient_severity(history) if found.kind == "gradient" else "critical"
        where = f"{found.tensor} of {found.layer or 'the run'}"
        more = {"tensor": found.tensor, "detail": found.detail, "first_step": found.step, "first_bad": where}
        return self._issue(history.latest.step, found.layer, found.head, found.kind, math.nan, severity, more)

    def _gradient_severity(self, history: History) -> Severity:
        if history.latest.loss is not None and not math.isfinite(history.latest.loss):
            return "critical"
        newest = history.readings[-self.gradient_readings :]
        bad = [
            (r.non_finite is not None and r.non_finite.kind == "gradient") or not math.isfinite(r.gradients.get("", 0.0))
            for r in newest
        ]
        return "critical" if all(bad) and len(bad) == self.gradient_readings else "warning"

    def _issue(
        self,
        step: int,
        layer: str | None,
        head: int | None,
        kind: str,
        value: float,
        severity: Severity = "critical",
        more: dict[str, object] | None = None,
    ) -> StabilityIssue:
        suggestion = SCALER if severity == "warning" else ROLL_BACK
        evidence = {"kind": kind} | (more or {})
        threshold = float(np.finfo(np.float32).max)
        return StabilityIssue(step, layer, head, "non_finite", severity, float(value), threshold, suggestion + ".", evidence)
