"""Rules say their issues in words, whatever the evidence."""

import math

import numpy as np
import pytest

from stabmon.records import Reading, StabilityIssue
from stabmon.rules import RULES
from stabmon.rules.logit_growth import LogitGrowth
from stabmon.rules.loss_spike import LossSpike
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from stabmon.rules.wording import code_lines
from stabmon.rules.wording.code_lines import FRAMEWORKS


@pytest.mark.parametrize("name", list(RULES))
@pytest.mark.parametrize("value", [0.3, math.nan, math.inf])
def test_every_rule_says_its_issues_without_evidence(name: str, value: float) -> None:
    found = RULES[name]
    for place in ((None, None), ("h.0", None), ("h.0", 3)):
        for kind in found.issue_types or (name,):
            issue = StabilityIssue(7, *place, kind, "critical", value, 3.4e38, "advice")
            for framework in FRAMEWORKS:
                words = found.describe([issue], framework)
                assert words.title
                assert words.advice == "advice"
                assert "e+38" not in words.numbers
                assert "_" not in words.title.replace("W_q", "").replace("W_k", "")


def test_code_names_each_framework_in_its_own_terms() -> None:
    assert "TrainingArguments" in code_lines.set_rate("transformers", 1e-3)
    assert "configure_optimizers" in code_lines.set_rate("lightning", 1e-3)
    assert "param_groups" in code_lines.set_rate("loop", 1e-3)
    lines = code_lines.set_group_rates("lightning", {"1.0": 0.1, "0.2": 0.5})
    assert lines.splitlines() == [
        'trainer.optimizers[0].param_groups[2]["lr"] = 0.5',
        'trainer.optimizers[1].param_groups[0]["lr"] = 0.1',
    ]
    for line in (code_lines.clip_gradients, code_lines.resume):
        assert len({line(framework, 3) for framework in FRAMEWORKS}) == 3


def run(scores: list[float]) -> list[StabilityIssue]:
    """Return the issues of a head with these largest scores, its entropy falling with them."""
    tracker = IssueTracker([LogitGrowth()], history=History(), cooldown_steps=10)
    found = []
    for step, score in enumerate(scores, start=1):
        values = {"max_logit": score, "normalized_entropy": 0.2 if score > 20 else 0.7}
        layers = {"h.0": {name: np.array([value]) for name, value in values.items()}}
        found += tracker.update(Reading(10 * step, None, layers))
    return found


def test_an_issue_has_its_own_past_and_closes_at_the_value_of_then() -> None:
    opened, *_, closed = run([11.0, 12.0, 12.0, 12.0, 90.0, 90.0, *[13.0] * 8])
    assert opened.evidence["value_before"] == 12.0
    assert opened.evidence["step_before"] == 40
    assert opened.evidence["growth_per_step"] == pytest.approx((90 / 12) ** 0.1 - 1)
    assert opened.evidence["usual_growth_per_step"] == pytest.approx((12 / 11) ** (1 / 30) - 1)
    assert closed.state == "closed"
    assert closed.value == 13.0
    assert closed.evidence["worst_value"] == 90.0
    assert closed.evidence["opened_at"] == opened.step


def test_a_loss_closes_at_the_newest_loss() -> None:
    history = History()
    history.add(Reading(10, 2.5, {}, losses=((9, 2.25), (10, 2.5))))
    issue = StabilityIssue(5, None, None, "loss_spike", "error", 9.0, 3.0, "")
    assert LossSpike.value_now(issue, history) == 2.5
