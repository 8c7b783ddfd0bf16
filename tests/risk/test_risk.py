"""The risk of a layer: its features worked by hand, and what it decides."""

import json
from dataclasses import replace
from importlib import resources

import numpy as np
import pytest

from stabmon.records import QKUpdate, Reading, StabilityIssue
from stabmon.risk import Piece, RiskJudge, RiskModel, load_risk_model
from stabmon.risk.features import FEATURES, layer_features
from stabmon.rules.entropy_collapse import EntropyCollapse
from stabmon.rules.logit_growth import LogitGrowth
from stabmon.rules.tracking.history import History
from stabmon.rules.tracking.issue_tracker import IssueTracker


def reading(step, scores, entropies, saturated=0.0, *, gradient=0.1, update=0.01, loss=2.0):
    """Return a reading of layers ``a``, ``b`` …, each with the same heads."""
    layers = {
        name: {
            "max_logit": np.asarray(scores, float),
            "normalized_entropy": np.asarray(entropies, float),
            "saturated_fraction": np.full(len(scores), float(saturated)),
        }
        for name in "ab"
    }
    moved = {name: QKUpdate(gradient, 10.0, 10.0 * update) for name in layers}
    return Reading(
        step,
        loss,
        layers,
        gradients={"": 1.0},
        query_key=moved,
        updates={"0.0": 0.01, "0.1": 0.02, "0.2": 0.005},
        losses=((step, loss),),
    )


def history_of(*readings):
    history = History()
    for each in readings:
        history.add(each)
    return history


def test_features_are_those_worked_by_hand():
    history = history_of(
        reading(1, [2.0, 2.0], [0.8, 0.8]),
        reading(60, [3.0, 3.0], [0.6, 0.7], 0.1),
        reading(100, [9.0, 3.0], [0.2, 0.6], 0.5, gradient=0.01, update=0.04),
    )
    found = {name: values.tolist() for name, values in layer_features(history).items()}
    assert list(found) == list(FEATURES)
    assert found["entropy_lost"] == pytest.approx([0.6] * 2)
    assert found["start"] == pytest.approx([0.2] * 2)  # all alike at first, and that little lost
    assert found["start_score"] == pytest.approx([np.log(2.0)] * 2)
    # past: the median of 0 and 0.1, and of their steps 1 and 60; 15 and 45 steps of 69.5 count
    assert found["sat10"] == pytest.approx([0.45 * (15 / 69.5) ** 0.5] * 2)
    assert found["sat40"] == pytest.approx([0.45 * (45 / 69.5) ** 0.5] * 2)
    assert found["heads10"] == pytest.approx([0.5] * 2)
    shares = np.median([0.1, 0.1, 0.01]) * 2**0.5
    assert found["gradient_missed"] == pytest.approx([-np.log(shares)] * 2)
    assert found["update_rel"] == pytest.approx([np.log(0.01 / 0.01)] * 2)


def test_trained_heads_that_differ_say_nothing_of_the_start():
    alike = layer_features(history_of(reading(1, [30.0] * 4, [0.1] * 4)))
    trained = layer_features(history_of(reading(1, [2.0, 30.0, 90.0, 5.0], [0.9, 0.1, 0.02, 0.5])))
    assert alike["start"][0] == pytest.approx(0.9)
    assert trained["start"][0] < 0.01
    assert trained["start_score"][0] < 0.05


def test_heads_not_measured_at_first_are_not_taken_for_heads_that_began_badly():
    unknown = [np.nan, np.nan]
    found = layer_features(
        history_of(reading(1, unknown, unknown), reading(60, [90.0, 90.0], [0.1, 0.1]))
    )
    for feature in ("start", "start_score"):
        assert np.isnan(found[feature]).all()


def test_more_of_a_feature_is_never_less_risk():
    model = load_risk_model()
    assert {piece.feature for piece in model.pieces} == set(FEATURES)
    for piece in model.pieces:
        values = piece.of(np.linspace(-50, 50, 201))
        assert (np.diff(values) >= 0).all()
        assert piece.weight >= 0


def test_an_unknown_feature_counts_as_a_healthy_runs_median():
    piece = Piece("sat10", 0.1, 0.5, 2.0)
    assert piece.of(np.array([np.nan, 0.1])).tolist() == [0.0, 0.0]


def test_a_smaller_rate_of_false_alarms_asks_for_more_risk():
    model = load_risk_model()
    levels = [model.threshold(rate) for rate in (0.001, 0.01, 0.05, 0.07, 0.2, 0.4)]
    assert levels == sorted(levels, reverse=True)
    assert levels[0] > levels[-1]


def test_the_stored_model_names_its_features_and_its_source():
    text = resources.files("stabmon.risk").joinpath("model.json").read_text()
    data = json.loads(text)
    assert data["features"] == FEATURES
    assert data["source"]
    assert RiskModel.from_dict(data) == load_risk_model()


@pytest.mark.parametrize("data", [{}, {"pieces": 3}, {"pieces": [{"feature": "sat10"}]}])
def test_what_is_no_model_is_refused(data):
    with pytest.raises(ValueError, match="no risk model"):
        RiskModel.from_dict(data)


def tracker(**settings):
    return IssueTracker(
        [LogitGrowth(), EntropyCollapse()],
        history=History(),
        cooldown_steps=0,
        judge=RiskJudge(**settings),
    )


def test_a_model_saturated_at_its_first_reading_alarms_at_that_reading():
    watching = tracker()
    issues = watching.update(reading(1, [40.0] * 4, [0.05] * 4, 0.8))
    assert {issue.issue_type for issue in issues} == {"entropy_collapse"}
    assert all(issue.is_alarm and issue.evidence["from_the_start"] for issue in issues)
    assert {(issue.layer, issue.head) for issue in issues} == {
        (layer, head) for layer in "ab" for head in range(4)
    }
    assert min(watching.risks.values()) > issues[0].evidence["risk_limit"]


def test_layers_that_share_a_bad_start_alarm_with_the_one_that_is_above_the_threshold():
    model = load_risk_model()
    layers = {
        name: {
            "max_logit": np.full(4, score),
            "normalized_entropy": np.full(4, entropy),
            "saturated_fraction": np.zeros(4),
        }
        for name, score, entropy in (("a", 22.0, 0.3), ("b", 19.0, 0.36), ("c", 14.0, 0.6))
    }
    history = History()
    history.add(Reading(1, 5.5, layers))
    chance = model.probability(model.contributions(history))
    between = replace(model, thresholds={0.05: float(chance[:2].mean())})
    assert chance[0] > chance[1] > 0.5 * between.threshold(0.05) > chance[2]
    _, found = RiskJudge(model=between).judge(history, {})
    assert {issue.layer for issue, _ in found.values()} == {"a", "b"}
    above = replace(model, thresholds={0.05: float(chance[0]) + 1e-6})
    assert not RiskJudge(model=above).judge(history, {})[1]


@pytest.mark.parametrize(("step", "severity"), [(101, "error"), (102, "warning")])
def test_a_brisk_beginning_explains_heads_that_break_within_a_hundred_steps_alone(step, severity):
    history = history_of(reading(step, [90.0] * 4, [0.05] * 4, 0.8))
    evidence = {"how": "brisk", "found_at": 1}
    issue = StabilityIssue(step, None, None, "update_spike", "error", 0.1, 1e-3, "", evidence)
    _, decided = RiskJudge().judge(history, {issue.key: (issue, "update_spike")})
    assert any(each.layer is not None for each, _ in decided.values()), "heads break"
    assert decided[issue.key][0].severity == severity


def test_a_healthy_start_has_no_issue_and_a_small_risk():
    watching = tracker()
    for step in (1, 2, 4, 8, 16, 50):
        assert watching.update(reading(step, [2.0, 3.0, 2.5], [0.9, 0.85, 0.9])) == []
    assert max(watching.risks.values()) < 0.05


def test_findings_of_rules_are_warnings_where_the_risk_is_small():
    history = [reading(step, [12.0] * 8, [0.7] * 8) for step in range(10, 60, 10)]
    one = reading(60, [90.0, *[12.0] * 7], [0.2, *[0.7] * 7])
    by_rules = IssueTracker([LogitGrowth()], history=History(), cooldown_steps=0)
    watching = tracker(model=replace(load_risk_model(), bias=-20.0))
    for each in history:
        assert by_rules.update(each) == [] == watching.update(each)
    assert [issue.severity for issue in by_rules.update(one)] == ["error"] * 2
    judged = watching.update(one)
    assert {issue.severity for issue in judged} == {"warning"}
    assert all("risk" in issue.evidence for issue in judged)


def test_a_layer_at_risk_alarms_also_where_no_rule_found_anything():
    watching = tracker(model=replace(load_risk_model(), bias=20.0))
    issues = watching.update(reading(10, [2.0, 3.0], [0.9, 0.8]))
    assert {issue.evidence["how"] for issue in issues} == {"risk"}
    assert all(issue.is_alarm and issue.suggestion for issue in issues)
    assert watching.update(reading(20, [2.0, 3.0], [0.9, 0.8])) == []  # open, and not repeated


def test_the_alarm_closes_once_the_scores_are_back():
    watching = tracker()
    for step in (1, 5, 10, 15, 20):
        watching.update(reading(step, [4.0] * 4, [0.8] * 4))
    opened = watching.update(reading(30, [60.0] * 4, [0.05] * 4, 0.9))
    assert opened
    assert all(issue.is_alarm for issue in opened)
    states = []
    for step in range(35, 130, 5):
        states += [issue.state for issue in watching.update(reading(step, [4.0] * 4, [0.8] * 4))]
    assert set(states) == {"closed"}
    assert not watching.open_issues


def test_layers_without_entropy_leave_it_to_the_rules():
    watching = tracker()
    for step in (1, 2, 3):
        watching.update(Reading(step, 1.0, {"a": {"max_logit": np.array([500.0, 600.0])}}))
    assert watching.risks == {}
