"""NaN or inf: the tensor it started in, its cause, and how far it has come."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np

from stabmon._settings import Count
from stabmon._torch.number_formats import LARGEST
from stabmon.records import Cause, Reading, Severity, StabilityIssue
from stabmon.records import NonFinite as Finding
from stabmon.rules.base import Rule, rule
from stabmon.rules.symptoms import NON_FINITE, Symptom
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.reading_arrays import LooksBack
from stabmon.rules.wording.code_lines import resume
from stabmon.rules.wording.description import Description

CAUSES: Mapping[Cause, str] = {
    "mask": (
        "The mask hides every key from some query rows, or is not finite itself, and a softmax "
        "over nothing is NaN: leave sequences without a token out of the batch, let each row see "
        "at least its own key, and hide keys once, by a boolean mask (finfo.min added twice is "
        "-inf, and 0 * -inf is NaN)"
    ),
    "overflow": (
        "A value is beyond what its number format holds (float16 ends at "
        f"{LARGEST['float16']:.0f}): run this part in bfloat16 or float32, scale queries before "
        "they meet keys, and look for an exp, or a division by almost 0, of an unbounded value"
    ),
    "labels": (
        "No target of the batch counts, as where every label is ignored (-100), so that its mean "
        "is 0/0: leave such batches out, or divide the sum by max(1, count)"
    ),
    "objective": (
        "The model's own tensors are finite, so check the loss function: exp of an unbounded "
        "difference (clamp it, or mask it before exp), a root or a norm at exactly 0 (add an "
        "epsilon under the root), log of 0, a division by a count of 0, a CTC target longer than "
        "its input, and values that a mask removes only afterwards (0 * inf is NaN in backward: "
        "use torch.where before)"
    ),
    "data": (
        "The batch itself holds values that are not finite: check where it is made, and leave "
        "such samples out"
    ),
    "weights": (
        "A parameter is no longer finite, or has blown up, and everything after it: check the "
        "gradients and the rate in the steps before, and the code that wrote or loaded the weights"
    ),
    "optimizer": (
        "The optimizer's step itself made weights that are not finite, though the gradients it "
        "was given were: check its learning rate (0 < lr < inf), eps (with 0 a gradient of 0 "
        "gives 0/0), betas, and the number format of its state"
    ),
    "arithmetic": (
        "A module makes it of finite values: look in it for a root or a norm at exactly 0, where "
        "the slope is infinite (add an epsilon under the root), log of 0 or less, and 0/0"
    ),
    "": "Check the first bad tensor, and the computation right before it",
}
"""Suggestion by cause."""
UNDAMAGED = (
    "Gradients and weights are finite: this step does no damage, and going back would repair "
    "nothing"
)
"""Consequence where gradients and weights are finite."""
SKIPPED = "The step was skipped, and the weights are finite"
"""Consequence where the optimizer skipped the step."""
AT_RISK = "The weights are corrupted unless the step is skipped"
"""Consequence where the step has not been made yet."""
ROLL_BACK = (
    "Go back to the last good checkpoint (about 100 steps) and pass by the batches in between: a "
    "NaN that has reached the parameters stays in them"
)
"""Consequence where the weights are not finite, or nothing is known of them."""


@rule
@dataclass(frozen=True)
class NonFinite(Rule):
    """NaN or inf in weights, data, activations or loss.

    Three kinds of evidence, the most exact first: the first bad tensor, where the monitor has
    traced it (where it could not, as with sharded parameters, a head whose scores are NaN beside
    others of its layer that are not); a head whose largest score is infinite; a loss or a gradient norm that is NaN or inf.
    The trace wins over the others, so that one accident is one issue.

    Critical where it is in the weights, since nothing after it can be trusted; a warning where it
    is in the loss alone, or in gradients of a step that was skipped; an error where more steps in a
    row were skipped than a gradient scaler's search takes, and critical where twice as many were:
    then nothing is trained.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> history.add(Reading(7, float("nan"), {}))
        >>> NonFinite().check(history)
        [StabilityIssue(critical non_finite, run, step 7, value nan)]

    References:
        Micikevicius et al. 2018, arXiv:1710.03740, on loss scaling and the steps that it skips.
    """

    symptom: ClassVar[Symptom] = NON_FINITE
    quantity: ClassVar[str] = "first bad value"

    gradient_readings: Count = 3
    """Number of readings in a row with a bad gradient for a critical issue.

    Where nothing is known of the weights.
    """

    @classmethod
    def has_own_cause(cls, issue: StabilityIssue) -> bool:
        """Return True for a NaN that mask, labels, objective or data made."""
        return issue.evidence.get("cause") in ("mask", "labels", "objective", "data")

    @classmethod
    def value_now(cls, issue: StabilityIssue, history: History) -> float | None:
        """Return the newest loss where the issue is of the run."""
        return history.latest.loss if issue.layer is None else None

    @classmethod
    def describe(cls, issues: Sequence[StabilityIssue], framework: str) -> Description:
        """Return the first bad tensor, its cause and the damage in words."""
        worst, evidence = issues[0], issues[0].evidence
        kind = evidence.get("kind", "loss")
        at = evidence.get("first_bad")
        title = f"NaN or inf in {at}" if at else f"NaN or inf in the {kind}"
        words = [f"found in step {evidence['first_step']}"] if "first_step" in evidence else []
        words += [f"cause: {evidence['cause']}"] if evidence.get("cause") else []
        words += [str(evidence["detail"])] if evidence.get("detail") else []
        skipped = evidence.get("skipped")
        words += [f"{skipped} steps in a row skipped"] if skipped else []
        damage = {
            "weights": "weights are corrupted",
            "gradients": "the step was left out, weights are finite",
            "nothing": "gradients and weights are finite",
        }
        words += [damage[evidence["touched"]]] if evidence.get("touched") in damage else []
        step = int(evidence.get("first_step", worst.step))
        code = resume(framework, step) if worst.severity == "critical" else ""
        return Description(title, "; ".join(words), worst.suggestion, code)

    def looks_back(self) -> LooksBack:
        """Return the part of the history that :meth:`check` looks at."""
        return LooksBack({})

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return the issue at the first bad tensor, at each infinite score, or of the run.

        A NaN score alone gives none, since it also means that no row was measured.
        """
        reading = history.latest
        if reading.non_finite is not None:
            return [self._traced(history, _placed(reading, reading.non_finite))]
        bad_heads = np.flatnonzero(np.isposinf(history.now("max_logit")))
        if len(bad_heads):
            words, kind = f"{CAUSES['overflow']}. {ROLL_BACK}", {"kind": "score"}
            return [
                self._issue(reading.step, *history.heads[n], np.inf, "critical", words, kind)
                for n in bad_heads
            ]
        losses = reading.losses or (
            ((reading.step, reading.loss),) if reading.loss is not None else ()
        )
        for step, loss in losses:
            if not math.isfinite(loss):
                undamaged = self._went_on(history, step)
                words = f"{CAUSES['']}. {UNDAMAGED if undamaged else ROLL_BACK}"
                severity: Severity = "warning" if undamaged else "critical"
                return [self._issue(step, None, None, loss, severity, words, {"kind": "loss"})]
        gradient = reading.gradients.get("", 0.0)
        if not math.isfinite(gradient):
            severity = self._gradient_severity(history)
            words = f"{CAUSES['']}. {ROLL_BACK if severity == 'critical' else AT_RISK}"
            kind = {"kind": "gradient"}
            return [self._issue(reading.step, None, None, gradient, severity, words, kind)]
        return []

    def _traced(self, history: History, found: Finding) -> StabilityIssue:
        where = f"{found.tensor} of {found.layer or 'the run'}"
        evidence: dict[str, Any] = {
            name: getattr(found, name) for name in ("kind", "cause", "touched", "tensor", "detail")
        }
        # an episode that comes back is a cause found anew, whatever was reported of the last
        evidence |= {"first_step": found.step, "found_at": found.step, "first_bad": where}
        if found.skipped:
            evidence["skipped"] = found.skipped
            if found.scale is not None:
                evidence["scale"] = found.scale
        severity = self._severity(history, found)
        words = f"{CAUSES[found.cause]}. {self._consequence(found, severity)}"
        step = history.latest.step
        return self._issue(step, found.layer, found.head, math.nan, severity, words, evidence)

    def _severity(self, history: History, found: Finding) -> Severity:
        if found.touched == "weights":
            return "critical"
        if found.skipped > found.search:
            return "critical" if found.skipped > 2 * found.search else "error"
        if found.touched:
            return "warning"
        # of a record that does not say how far it has come
        return self._gradient_severity(history) if found.kind == "gradient" else "critical"

    def _consequence(self, found: Finding, severity: Severity) -> str:
        if found.touched == "weights":
            return ROLL_BACK
        if found.skipped and found.touched == "nothing":
            return (
                f"For {found.skipped} steps in a row every gradient was 0: nothing is trained "
                "until that is fixed"
            )
        if found.skipped:
            scaler = f" by the gradient scaler, whose scale is down to {found.scale or 0:.3g}"
            return (
                f"{found.skipped} steps in a row were skipped"
                f"{'' if found.scale is None else scaler}: nothing is trained until that is fixed"
            )
        words = {"nothing": UNDAMAGED, "gradients": SKIPPED}
        return words.get(found.touched, ROLL_BACK if severity == "critical" else AT_RISK)

    def _went_on(self, history: History, step: int) -> bool:
        """Return True if the weights are known to be finite after a bad loss.

        A later loss is finite, or the gradients at the loss itself are.
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
        return StabilityIssue(
            step,
            layer,
            head,
            "non_finite",
            severity,
            value=float(value),
            threshold=LARGEST["float32"],
            suggestion=words + ".",
            evidence=evidence,
        )


def _placed(reading: Reading, found: Finding) -> Finding:
    """Return a finding of the whole run at the first head that alone in its layer is NaN.

    What is NaN before a layer makes all of its heads NaN.
    """
    if found.layer is not None or found.kind not in ("gradient", "loss"):
        return found
    for layer, signals in reading.layers.items():
        bad = ~np.isfinite(signals.get("max_logit", np.zeros(0)))
        if bad.any() and not bad.all():
            head = int(np.flatnonzero(bad)[0])
            return replace(found, kind="score", layer=layer, head=head, tensor="score")
        if bad.any():
            break
    return found
