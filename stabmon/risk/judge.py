"""Decide by the risk of a layer whether issues of its attention are alarms."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from stabmon.records import Severity, StabilityIssue
from stabmon.risk.features import past_rows
from stabmon.risk.model import RiskModel, load_risk_model
from stabmon.rules.base import rule_name, rule_of
from stabmon.rules.entropy_collapse import FROM_THE_START, EntropyCollapse
from stabmon.rules.evidence.context import advice, context_of
from stabmon.rules.evidence.driver import driver_of
from stabmon.rules.logit_growth import CLIP, LogitGrowth
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import Found, Key

START = ("start", "start_score")
"""Features that speak of the start of a run."""
KEPT = 0.5
"""Share of the alarming risk below which an alarm is over.

From it on a layer alarms as well while another is wrong from the start, and so is it.
"""

RESTS_ON_HEADS = ("brisk",)
"""Evidence of a rate that is too high only if heads break: an alarm where a layer's risk says so."""
SOON = 100
"""Steps after such evidence within which heads break by it: later the rate has proven itself."""


@dataclass(frozen=True)
class RiskJudge:
    """Judge of issues that say how attention looks, and not whether it does damage.

    Rules name type, layer, head and evidence of what they find; where a rule is
    ``judged_by_risk``, its issue is an error while its layer's risk is above the threshold, and a
    warning below. A layer above it in which no rule found anything gets an issue of its own, at the
    heads that changed most.

    Args:
        false_alarm_rate: share of healthy runs that may alarm, in (0, 1).
        model: the risk; None for the one that comes with the package.

    Example:
        >>> from stabmon.records import Reading
        >>> history = History()
        >>> signals = {"normalized_entropy": np.full(4, 0.05), "max_logit": np.full(4, 90.0)}
        >>> history.add(Reading(1, 5.5, {"attn": signals}))
        >>> risks, found = RiskJudge().judge(history, {})
        >>> [(issue.issue_type, issue.severity) for issue, _ in found.values()][:1]
        [('entropy_collapse', 'error')]
    """

    false_alarm_rate: float = 0.05
    model: RiskModel | None = None

    def judge(self, history: History, found: Found) -> tuple[dict[str, float], Found]:
        """Return the risk of each layer, and the issues as they are to be reported.

        Args:
            history: the readings so far.
            found: what the rules found at the newest reading.

        Returns:
            Risk by layer, in [0, 1], of the layers in the newest reading; and ``found`` with its
            severities decided, and with the judge's own issues.
        """
        model = self.model or load_risk_model()
        if not history.layers:
            return {}, found
        parts = model.contributions(history)
        chance, level = model.probability(parts), model.threshold(self.false_alarm_rate)
        levels = np.array([self._level(history, layer, level) for layer in history.layers])
        fresh = _rests_on_start(history, parts)
        if (fresh & (chance >= levels)).any():  # layers were made alike, and share what is wrong
            levels[fresh] = KEPT * level
        decided, risks, any_alarmed = dict(found), {}, False
        judged_of: dict[str | None, list[Key]] = {}
        for key, (issue, _) in found.items():
            if _is_judged(issue):
                judged_of.setdefault(issue.layer, []).append(key)
        for at, layer in enumerate(history.layers):
            if not self._is_known(history, layer):
                continue
            risk = risks[layer] = float(chance[at])
            own = {name: float(values[at]) for name, values in parts.items()}
            judged = judged_of.get(layer, [])
            alarmed = bool(risk >= levels[at])
            any_alarmed |= alarmed
            because: dict[str, Any] = {"risk": risk, "risk_limit": level}
            for key in judged:
                issue, rule = found[key]
                evidence = {**issue.evidence, **because}
                severity: Severity = "error" if alarmed else "warning"
                issue = replace(issue, severity=severity, evidence=evidence)
                decided[key] = (_with_driver(history, issue) if alarmed else issue, rule)
            if alarmed and not judged:
                for issue in self._own_issues(history, layer, own, because):
                    decided[issue.key] = (_with_driver(history, issue), "logit_growth")
        for key, (issue, rule) in found.items() if risks else ():
            rests = issue.layer is None and issue.evidence.get("how") in RESTS_ON_HEADS
            age = history.latest.step - issue.evidence.get("found_at", history.latest.step)
            if rests and (not any_alarmed or age > SOON):
                decided[key] = replace(issue, severity="warning"), rule
        return risks, decided

    @staticmethod
    def _is_known(history: History, layer: str) -> bool:
        """Return whether the newest reading has what the risk rests on."""
        where = history.of_layer(layer)
        return any(
            bool(np.isfinite(history.now(name)[where]).any())
            for name in ("normalized_entropy", "saturated_fraction")
        )

    @staticmethod
    def _level(history: History, layer: str, level: float) -> float:
        """Return the risk from which a layer alarms; lower where it does already."""
        kinds = ("logit_growth", "entropy_collapse")
        return level * (KEPT if any(history.is_alarmed_at(kind, layer) for kind in kinds) else 1.0)

    def _own_issues(
        self, history: History, layer: str, parts: Mapping[str, float], because: dict[str, Any]
    ) -> list[StabilityIssue]:
        """Return an issue for each head that changed most, or that is saturated."""
        where = history.of_layer(layer)
        score, entropy = (history.now(name)[where] for name in ("max_logit", "normalized_entropy"))
        first = max(parts, key=lambda name: parts[name])
        from_start = first in START and history.is_at_start(layer)
        rows = past_rows(history, 40)
        past = np.nanmedian(history.rows("max_logit", rows, where), axis=0)
        with np.errstate(invalid="ignore"):
            chosen = np.isfinite(score) & (from_start | (score > 2 * past))
        kind = EntropyCollapse if from_start else LogitGrowth
        chosen |= history.is_open(rule_name(kind))[where]
        chosen = chosen if chosen.any() else np.isfinite(score)
        evidence = {
            **because,
            "how": "risk",
            "risk_by": first,
            "from_the_start": from_start,
            "since_step": int(history.steps[rows][-1]),
            "normalized_entropy": None,
        }
        made = []
        for head in np.flatnonzero(chosen).tolist():
            own = evidence | {
                "normalized_entropy": float(entropy[head]),
                "max_logit": float(score[head]),
            }
            made.append(
                StabilityIssue(
                    history.latest.step,
                    layer,
                    head,
                    rule_name(kind),
                    "error",
                    float(entropy[head] if from_start else score[head]),
                    EntropyCollapse.start if from_start else float(2 * past[head]),
                    FROM_THE_START if from_start else advice(history, layer, CLIP),
                    own | context_of(history, layer),
                )
            )
        return made


def _rests_on_start(history: History, parts: Mapping[str, np.ndarray]) -> np.ndarray:
    """Return ``[L]`` bool: the risk rests most on how the layer was at the start of the run."""
    if not parts:
        return np.zeros(len(history.layers), dtype=bool)
    most = np.array(list(parts))[np.argmax(list(parts.values()), axis=0)]
    at_start = [history.is_at_start(layer) for layer in history.layers]
    found: np.ndarray = np.isin(most, START) & np.array(at_start)
    return found


def _is_judged(issue: StabilityIssue) -> bool:
    rule = rule_of(issue.issue_type)
    decides = getattr(rule, "is_judged_by_risk", None)
    return issue.layer is not None and decides is not None and bool(decides(issue))


def _with_driver(history: History, issue: StabilityIssue) -> StabilityIssue:
    """Name the rate or the scale that drove an alarm's heads, where one rose before it."""
    named = issue.evidence.get("from_the_start") or issue.evidence.get("how") == "jump"
    if named or issue.layer is None:
        return issue
    driver = driver_of(history, issue.layer)
    if driver is None:
        return issue
    evidence = {**issue.evidence, **driver.evidence}
    return replace(issue, suggestion=driver.advice, evidence=evidence)
