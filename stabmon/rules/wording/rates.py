"""Describe learning rates that are too high."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stabmon.records import StabilityIssue
from stabmon.rules.wording.code_lines import set_group_rates, set_rate
from stabmon.rules.wording.description import Description
from stabmon.rules.wording.numbers import known, number, share


def named_groups(evidence: Mapping[str, Any]) -> Mapping[str, float]:
    """Return the groups that an issue names as too fast, each with the rate that fits."""
    for name in ("fitting_rates", "highest_rates_before", "decays_before"):
        if found := evidence.get(name):
            return dict(found)
    return {}


def describe_rate(issue: StabilityIssue, framework: str) -> Description:
    """Return the rate of the run beside the one that fits in words, with the line that sets it."""
    evidence = issue.evidence
    if evidence.get("how") == "decay":
        return _describe_decay(issue)
    fitting, highest = known(evidence, "fitting_rate"), known(evidence, "highest_rate_before")
    rates = named_groups(evidence)
    of_all = len(rates) in (0, len(evidence.get("rates") or rates))
    rate = fitting or highest
    code = ""
    if rate is not None:
        code = set_rate(framework, rate) if of_all else set_group_rates(framework, rates)
    if fitting is None:
        times = "" if not highest else f", {number(issue.value / highest)} times the highest before"
        numbers = f"learning rate {number(issue.value)}{times} ({number(highest or 0)})"
        numbers += _of_groups(evidence)
        return Description("learning rate jumped", numbers, issue.suggestion, code)
    numbers = f"learning rate {number(issue.value)}, {number(fitting)} fits"
    if issue.value > fitting:
        numbers += f" ({number(issue.value / fitting)} times lower)"
    gained, moved = known(evidence, "gain_ratio"), known(evidence, "largest_query_key_update")
    rise = known(evidence, "rise")
    if evidence.get("how") in ("torn", "leap") and rise is not None:
        numbers += f"; the loss rose by {share(rise)}"
    elif gained is not None:
        of = "nothing" if gained <= 0 else share(gained)
        numbers += f"; steps gain {of} of what their gradient foretells"
    elif moved is not None:
        numbers += f"; a step changed {share(moved)} of W_q and W_k"
    return Description("learning rate too high", numbers, issue.suggestion, code)


def _describe_decay(issue: StabilityIssue) -> Description:
    taken = max(issue.evidence.get("shares_taken", {}).values(), default=None)
    numbers = f"weight decay {number(issue.value)}"
    numbers += "" if taken is None else f" takes {share(taken)} of the weights in a step"
    numbers += _of_groups(issue.evidence)
    return Description("weight decay jumped", numbers, issue.suggestion)


def _of_groups(evidence: Mapping[str, Any]) -> str:
    named = [f"{key} {words}".strip() for key, words in evidence.get("groups", {}).items()]
    return f", of parameter group {'; '.join(named)}" if named else ""
