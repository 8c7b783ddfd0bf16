"""The life of an issue: opened once, worsened, closed with hysteresis, kept quiet for a while,
resumed where it was.
"""

import json
import math
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from stabmon.records import NonFinite, StabilityIssue
from stabmon.rules import History
from stabmon.rules.tracking.issue_tracker import IssueTracker
from tests.support.trajectories import LAYERS, readings, run, shape, signals, tracker

QUIET = signals(shape(np.full(40, 8.0), 0.05), shape(np.full(40, 0.6), 0.02))


@dataclass(frozen=True)
class Scripted:
    """Finds at each step what it was told: ``{step: (severity, value)}``."""

    script: dict[int, tuple[str, float]]
    head: int | None = 1

    def check(self, history):
        if history.latest.step not in self.script:
            return []
        severity, value = self.script[history.latest.step]
        layer = None if self.head is None else LAYERS[0]
        return [
            StabilityIssue(
                history.latest.step,
                layer,
                self.head,
                "scripted",
                severity,
                value,
                10.0,
                "Do.",
                {"x": 1},
            )
        ]


@dataclass(frozen=True)
class Raising:
    """Raises from its fifth reading on, and before that finds one issue."""

    def check(self, history):
        if len(history) >= 5:
            raise RuntimeError("boom")
        return [
            StabilityIssue(history.latest.step, None, None, "raising", "warning", 2.0, 1.0, "Do.")
        ]


def emitted(script, count=12, **options):
    issues = run(readings(QUIET, every=1)[:count], [Scripted(script)], **options)
    return [(i.step, i.state, i.severity) for i in issues]


def test_what_holds_on_is_told_once():
    assert emitted(dict.fromkeys(range(3, 13), ("warning", 12.0))) == [(3, "opened", "warning")]


def test_a_rise_in_severity_is_told_and_a_fall_is_not():
    script = {3: ("warning", 12.0), 4: ("error", 12.0), 5: ("warning", 12.0), 6: ("error", 12.0)}
    assert emitted(script, 6) == [(3, "opened", "warning"), (4, "worsened", "error")]


def test_a_value_three_times_as_far_out_is_told_and_keeps_the_worst_severity():
    script = {
        1: ("error", 20.0),
        2: ("error", 50.0),
        3: ("warning", 70.0),
        4: ("error", 80.0),
        5: ("error", 300.0),
    }
    assert emitted(script, 5) == [
        (1, "opened", "error"),
        (3, "worsened", "error"),
        (5, "worsened", "error"),
    ]


def test_an_infinite_value_worsens_no_further():
    assert emitted({s: ("critical", math.inf if s % 2 else math.nan) for s in range(1, 9)}, 8) == [
        (1, "opened", "critical")
    ]


def test_it_closes_after_two_readings_without_it_and_one_is_not_enough():
    script = dict.fromkeys((2, 3, 5, 6), ("error", 12.0))
    assert emitted(script) == [(2, "opened", "error"), (8, "closed", "info")]


def test_what_closed_stays_quiet_for_the_cooldown_then_opens_again():
    script = dict.fromkeys((1, *range(5, 13)), ("warning", 12.0))
    assert emitted(script, cooldown_steps=6) == [
        (1, "opened", "warning"),
        (3, "closed", "info"),
        (9, "opened", "warning"),
    ]


@pytest.mark.parametrize("worse", [("error", 12.0), ("warning", 40.0)])
def test_what_comes_back_worse_opens_within_the_cooldown(worse):
    assert emitted({1: ("warning", 12.0), 5: worse}, 5) == [
        (1, "opened", "warning"),
        (3, "closed", "info"),
        (5, "opened", worse[0]),
    ]


def test_a_head_that_was_not_measured_is_not_well():
    watched = readings(QUIET, every=1)[:8]
    watched[3:6] = [replace(r, layers={LAYERS[1]: r.layers[LAYERS[1]]}) for r in watched[3:6]]
    issues = run(watched, [Scripted({3: ("error", 12.0)})])
    assert [(i.step, i.state) for i in issues] == [(3, "opened"), (8, "closed")]


def test_a_raising_rule_is_told_of_once_and_stops_nobody():
    errors = []
    issues = run(
        readings(QUIET, every=1)[:10],
        [Raising(), Scripted({7: ("error", 12.0)})],
        on_error=errors.append,
    )
    assert [str(e) for e in errors] == ["boom"]
    assert "raising" in errors[0].__notes__[0]
    assert [(i.step, i.issue_type, i.state) for i in issues if i.issue_type == "raising"] == [
        (1, "raising", "opened")
    ]
    assert (7, "scripted") in [(i.step, i.issue_type) for i in issues]


def test_without_on_error_a_raising_rule_is_still_isolated():
    assert run(
        readings(QUIET, every=1)[:8], [Raising(), Scripted({7: ("error", 12.0)})], on_error=None
    )


def test_the_most_severe_comes_first_and_tells_how_many_heads_are_alike():
    score, entropy = QUIET["max_logit"].copy(), QUIET["normalized_entropy"].copy()
    score[20:, 1, :3] *= 40
    entropy[20:, 1, :3] = 0.01
    keeper = tracker()
    for reading in readings(signals(score, entropy))[:21]:
        issues = keeper.update(reading)
    severities = [i.severity for i in issues]
    assert severities == sorted(severities, key=["critical", "error", "warning", "info"].index)
    assert {i.evidence["heads_alike"] for i in issues if i.issue_type == "logit_growth"} == {3}
    assert len(keeper.open_issues) == len(issues)


def broken_run():
    score, entropy = QUIET["max_logit"].copy(), QUIET["normalized_entropy"].copy()
    score[15:30, 1, 2] *= 40
    entropy[15:30, 1, 2] = 0.01
    out = readings(
        signals(score, entropy), gradients=[{"": 1.0, LAYERS[0]: 0.3} for _ in range(40)]
    )
    out[34] = replace(out[34], non_finite=NonFinite(350, "gradient", LAYERS[0], None, "q.weight"))
    return out


@pytest.mark.parametrize("cut", [3, 15, 16, 18, 31, 35])
@pytest.mark.parametrize("through", ["json", "torch"])
def test_a_resumed_run_emits_what_the_whole_run_emits(cut, through, tmp_path):
    watched = broken_run()
    whole = tracker()
    expected = [[i.to_dict() for i in whole.update(r)] for r in watched]
    first = tracker()
    for reading in watched[:cut]:
        first.update(reading)
    state = first.state_dict()
    if through == "torch":
        torch.save(state, tmp_path / "state.pt")
        state = torch.load(tmp_path / "state.pt", weights_only=True)
    else:
        state = json.loads(json.dumps(state))
    second = tracker()
    second.load_state_dict(state)
    np.testing.assert_equal(
        [i.to_dict() for i in second.open_issues], [i.to_dict() for i in first.open_issues]
    )
    np.testing.assert_equal(
        [[i.to_dict() for i in second.update(r)] for r in watched[cut:]], expected[cut:]
    )


@pytest.mark.parametrize("options", [{"clear_after": 0}, {"cooldown_steps": -1}])
def test_impossible_settings_are_refused(options):
    with pytest.raises(ValueError, match="use at least 1 and 0"):
        IssueTracker([], **{"history": History(), "cooldown_steps": 1, **options})


def test_a_critical_alarm_is_never_kept_quiet():
    script = dict.fromkeys((1, 6), ("critical", 12.0))
    assert emitted(script, 6, cooldown_steps=50) == [
        (1, "opened", "critical"),
        (3, "closed", "info"),
        (6, "opened", "critical"),
    ]


@pytest.mark.parametrize(
    ("severity", "expected"),
    [
        ("error", [(1, "opened"), (3, "closed"), (6, "opened")]),
        ("warning", [(1, "opened"), (3, "closed")]),
    ],
)
def test_an_alarm_may_return_at_once_after_an_intervention_has_ended(severity, expected):
    keeper = IssueTracker(
        [Scripted(dict.fromkeys((1, 5, 6), (severity, 12.0)))],
        history=History(),
        cooldown_steps=50,
    )
    found = []
    for reading in readings(QUIET, every=1)[:6]:
        if reading.step == 6:
            keeper.end_cooldowns()
        found += [(issue.step, issue.state) for issue in keeper.update(reading)]
    assert found == expected
