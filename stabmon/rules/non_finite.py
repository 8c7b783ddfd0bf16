"""NaN or inf has come up: name the tensor it started in, what made it and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stabmon._settings import Count
from stabmon._torch.number_formats import LARGEST
from stabmon.records import Cause, Severity, StabilityIssue
from stabmon.records import NonFinite as Finding
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import NON_FINITE, Symptom
from stabmon.rules.tracking.history import History

CAUSES: Mapping[Cause, str] = {
    "mask": (
        "The mask hides every key from some query rows, or is not finite itself, and a softmax "
        "over nothing is NaN: leave sequences "
        "without a token out of the batch, let each row see at least its own key, and hide keys "
        "once, by a boolean mask (finfo.min "
        "added twice is -inf, and 0 * -inf is NaN)"
    ),
    "overflow": (
        f"A value is beyond what its number format holds (float16 ends at {LARGEST['float16']:.0f}): "
        "run this part in "
        "bfloat16 or float32, scale queries "
        "before they meet keys, and look for an exp, or a division by almost 0, of what is not "
        "bounded"
    ),
    "labels": (
        "No target of the batch counts, as where every label is ignored (-100), so that its mean "
        "is 0/0: leave such batches out, or "
        "divide the sum by max(1, count)"
    ),
    "objective": (
        "The model's own tensors are finite, so look at the loss function: exp of a difference "
        "that is not bounded (clamp it, or mask "
        "it before exp), a root or a norm at exactly 0 (add an epsilon under the root), log of 0, "
        "a division by a count of 0, a CTC "
        "target longer than its input, and what a mask takes out only afterwards (0 * inf is NaN "
        "in backward: use torch.where before)"
    ),
    "data": "The batch itself holds what is not finite: look where it is made, and leave such "
    "samples out",
    "weights": (
        "A parameter is no longer finite, or has blown up, and everything after it: look at the "
        "gradients and the rate in the steps "
        "before, and at whoever wrote or loaded the weights"
    ),
    "optimizer": (
        "The optimizer's step itself made weights that are not finite, though the gradients it "
        "was given were: look at its learning "
        "rate (0 < lr < inf), eps (with 0 a gradient of 0 gives 0/0), betas, and the number "
        "format of its state"
    ),
    "arithmetic": (
        "A module makes it of finite values: look in it for a root or a norm at exactly 0, where "
        "the slope is infinite (add an epsilon "
        "under the root), log of 0 or less, and 0/0"
    ),
    "": "Look at the first bad tensor, and at what is computed right before it",
}
"""What to mend, by what made it."""
UNHARMED = (
    "Gradients and weights are finite: this step harms nothing, and going back would mend nothing"
)
LEFT_OUT = "The step was left out, and the weights are finite"
ROLL_BACK = (
    "Go back to the last good checkpoint (about 100 steps) and pass by the batches in between: a "
    "NaN that has reached the parameters "
    "stays in them"
)


@rule
@dataclass(frozen=True)
class NonFinite(Rule):
    """A NaN or inf in a parameter, input, activation, score, gradient or loss, told by what made it
    and what it has touched.

    Three witnesses, the most exact first: the first bad tensor, where the monitor has traced it; a
        head whose largest score is
    infinite; a loss or a gradient norm that is NaN or inf. The trace wins over the others, so that
    one accident is one issue.

    Critical where it is in the weights, since nothing after it can be trusted; a warning where it
    is in the loss alone, or in gradients of a step that was left out; an error where more steps in
    a row were left out than a gradient scaler's search takes, and critical where twice as many
    were: then nothing is trained.
    """

    symptom: ClassVar[Symptom] = NON_FINITE

    gradient_readings: Count = 3
    """Readings in a row with a bad gradient, and nothing known of the weights, from which it is
    critical.
    """

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """One issue at the first bad tensor, or at each head with an infinite score, or one for the
        run; never for a NaN score alone, which also means that no row was measured."""
        reading = history.latest
        if reading.non_finite is not None:
            return [self._traced(history, reading.non_finite)]
        bad_heads = np.flatnonzero(np.isposinf(history.now("max_logit")))
        if len(bad_heads):
            words = f"{CAUSES['overflow']}. {ROLL_BACK}"
            return [
                self._issue(
                    reading.step, *history.heads[n], np.inf, "critical", words, {"kind": "score"}
                )
                for n in bad_heads
            ]
        losses = reading.losses or (
            ((reading.step, reading.loss),) if reading.loss is not None else ()
        )
        for step, loss in losses:
            if not math.isfinite(loss):
                unharmed = self._went_on(history, step)
                words = UNHARMED if unharmed else ROLL_BACK
                severity: Severity = "warning" if unharmed else "critical"
                return [
                    self._issue(
                        step, None, None, loss, severity, f"{CAUSES['']}. {words}", {"kind": "loss"}
                    )
                ]
        gradient = reading.gradients.get("", 0.0)
        if not math.isfinite(gradient):
            severity = self._gradient_severity(history)
            words = (
                f"{CAUSES['']}. "
                f"{ROLL_BACK if severity == 'critical' else 'The weights are spoilt unless the step is left out'}"
            )
            return [
                self._issue(
                    reading.step, None, None, gradient, severity, words, {"kind": "gradient"}
                )
            ]
        return []

    def _traced(self, history: History, found: Finding) -> StabilityIssue:
        where = f"{found.tensor} of {found.layer or 'the run'}"
        more: dict[str, Any] = {
            "kind": found.kind,
            "cause": found.cause,
            "touched": found.touched,
            "tensor": found.tensor,
            "detail": found.detail,
        }
        more |= {"first_step": found.step, "first_bad": where}
        if found.skipped:
            more |= {"skipped": found.skipped} | (
                {"scale": found.scale} if found.scale is not None else {}
            )
        severity = self._severity(history, found)
        words = f"{CAUSES[found.cause]}. {self._consequence(found, severity)}"
        return self._issue(
            history.latest.step, found.layer, found.head, math.nan, severity, words, more
        )

    def _severity(self, history: History, found: Finding) -> Severity:
        if found.touched == "weights":
            return "critical"
        if found.skipped > found.search:
            return "critical" if found.skipped > 2 * found.search else "error"
        if found.touched:
            return "warning"
        return (
            self._gradient_severity(history) if found.kind == "gradient" else "critical"
        )  # of a record that does not say

    def _consequence(self, found: Finding, severity: Severity) -> str:
        if found.touched == "weights":
            return ROLL_BACK
        if found.skipped:
            if found.touched == "nothing":
                return (
                    f"For {found.skipped} steps in a row every gradient was 0: nothing is "
                    "trained until that is mended"
                )
            by = (
                ""
                if found.scale is None
                else f" by the gradient scaler, whose scale is down to {found.scale:.3g}"
            )
            return (
                f"{found.skipped} steps in a row were left out{by}: nothing is trained until "
                "that is mended"
            )
        words = {"nothing": UNHARMED, "gradients": LEFT_OUT}
        return words.get(
            found.touched,
            ROLL_BACK
            if severity == "critical"
            else "The weights are spoilt unless the step is left out",
        )

    def _went_on(self, history: History, step: int) -> bool:
        """Whether the weights are known to be finite after a bad loss: a later loss, or the
        gradients at the loss itself, are.
        """
        reading = history.latest
        later = [loss for at, loss in reading.losses if at > step]
        return any(map(math.isfinite, later)) or math.isfinite(reading.gradients.get("", math.nan))

    def _gradient_severity(self, history: History) -> Severity:
        if history.latest.loss is not None and not math.isfinite(history.latest.loss):
            return "critical"
        newest = history.readings[-self.gradient_readings :]
        bad = [
            (r.non_finite is not None and r.non_finite.kind == "gradient")
            or not math.isfinite(r.gradients.get("", 0.0))
            for r in newest
        ]
        return "critical" if all(bad) and len(bad) == self.gradient_readings else "warning"

    def _issue(
        self,
        step: int,
        layer: str | None,
        head: int | None,
        value: float,
        severity: Severity,
        words: str,
        evidence: dict[str, Any],
    ) -> StabilityIssue:
        threshold = LARGEST["float32"]
        return StabilityIssue(
            step,
            layer,
            head,
            "non_finite",
            severity,
            float(value),
            threshold,
            words + ".",
            evidence,
        )
