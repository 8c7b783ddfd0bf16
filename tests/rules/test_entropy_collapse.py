"""A sudden loss of entropy is collapse only with other evidence; low entropy never is."""

import numpy as np
import pytest

from stabmon.rules import History
from stabmon.rules.entropy_collapse import EntropyCollapse
from tests.support.trajectories import (
    HEADS,
    LAYERS,
    alarms,
    falling_loss,
    readings,
    run,
    shape,
    signals,
)


def fallen(
    after: float,
    *,
    times: float,
    saturated: float,
    every: int = 10,
    before: float = 0.6,
    signal: str = "max_logit",
):
    """Head 3 of layer 0 falls to ``after`` at the 13th of 20 readings."""
    score, entropy = shape(np.full(20, 12.0), 0.05), shape(np.full(20, before), 0.02)
    share = shape(np.full(20, 0.05))
    share = share.copy()
    score[12:, 0, 3] *= times
    entropy[12:, 0, 3] = after
    share[12:, 0, 3] = saturated
    return readings(signals(score, entropy, share), losses=falling_loss(20 * every), every=every)


@pytest.mark.parametrize("every", [1, 10, 50])
def test_a_fall_with_a_jump_of_the_scores_is_collapse(every):
    found = alarms(run(fallen(0.01, times=25.0, saturated=0.9, every=every), [EntropyCollapse()]))
    assert [(i.step, i.layer, i.head) for i in found] == [(13 * every, LAYERS[0], 3)]
    assert found[0].value == pytest.approx(0.01)
    assert found[0].evidence["past_entropy"] == pytest.approx(0.6, rel=0.05)


def test_a_fall_whose_rows_saturate_at_once_is_collapse_even_where_the_score_is_negative():
    assert alarms(run(fallen(0.01, times=-20.0, saturated=0.9), [EntropyCollapse()]))


def test_a_fall_without_other_evidence_is_a_warning():
    found = run(fallen(0.1, times=1.0, saturated=0.3), [EntropyCollapse()])
    assert [i.severity for i in found] == ["warning"]


@pytest.mark.parametrize(("after", "anomalous"), [(0.30, False), (0.18, True)])
def test_the_fall_must_be_below_its_level(after, anomalous):
    assert bool(run(fallen(after, times=25.0, saturated=0.9), [EntropyCollapse()])) is anomalous


def test_a_head_without_spread_has_none_to_lose():
    assert not run(fallen(0.001, times=25.0, saturated=0.95, before=0.06), [EntropyCollapse()])


def test_a_slow_fall_to_nearly_one_hot_is_a_warning():
    entropy = shape(np.geomspace(0.6, 0.01, 60))
    found = run(
        readings(signals(shape(np.linspace(8, 30, 60)), entropy), losses=falling_loss(600)),
        [EntropyCollapse()],
    )
    assert {i.severity for i in found} == {"warning"}


def test_an_open_issue_stays_until_the_spread_is_well_back():
    score, entropy = shape(np.full(30, 12.0)).copy(), shape(np.full(30, 0.6)).copy()
    score[10:20], entropy[10:15], entropy[15:20] = 300.0, 0.01, 0.3
    found = run(readings(signals(score, entropy)), [EntropyCollapse()])
    assert {i.step for i in found if i.state == "opened"} == {110}
    assert {i.step for i in found if i.state == "closed"} == {220}


@pytest.mark.parametrize("value", [np.nan, 0.0])
def test_nan_and_zero_from_the_start_give_nothing(value):
    assert not run(
        readings(signals(shape(np.full(12, 12.0)), np.full((12, 2, 4), value))), [EntropyCollapse()]
    )


def from_the_start(
    *, score=100.0, apart=0.1, entropy=0.06, sink=0.02, start=5.5, end=2.0, scale=80.0, every=5
):
    """Forty readings of heads that are as they were at the first."""
    heads = signals(shape(np.full(40, score), apart, 3), shape(np.full(40, entropy), 0.05))
    heads["sink_mass"] = shape(np.full(40, sink), 0.01)
    return readings(
        heads,
        losses=falling_loss(40 * every, start=start, end=end, scale=scale, noise=0.01),
        every=every,
    )


@pytest.mark.parametrize("every", [1, 5, 50])
def test_a_fresh_model_that_starts_saturated_is_an_alarm_at_every_head(every):
    found = alarms(run(from_the_start(every=every), [EntropyCollapse()]))
    assert {(issue.layer, issue.head) for issue in found} == {
        (layer, head) for layer in LAYERS for head in range(HEADS)
    }
    assert all(issue.evidence["from_the_start"] for issue in found)
    assert max(issue.step for issue in found) <= max(25, every)


@pytest.mark.parametrize(
    "other",
    [
        {"start": 2.1},  # trained before: nothing left to lose
        {"score": 8.0},
        {"entropy": 0.6},
        {"sink": 0.8},
        {"apart": 0.8},  # heads that have learned differ
    ],
)
def test_what_has_been_learned_or_is_small_is_no_alarm(other):
    assert not alarms(run(from_the_start(**other), [EntropyCollapse()]))


def test_saturated_from_the_start_is_said_in_the_first_steps_alone():
    watched = from_the_start()
    for reading in watched[10:14] + watched[20:26]:  # in between all heads attend widely
        for values in reading.layers.values():
            values["normalized_entropy"] = np.full(HEADS, 0.8)
            values["max_logit"] = np.full(HEADS, 3.0)
    found = run(watched, [EntropyCollapse()], cooldown_steps=0)
    fresh = {each.step for each in found if each.evidence["from_the_start"] and each.is_alarm}
    assert fresh
    assert max(fresh) <= 50
    assert any(each.state == "opened" and each.step > 70 for each in found)  # by another name


@pytest.mark.parametrize("change", ["resumed", "treated"])
def test_nothing_is_said_of_the_start_after_a_resume_and_of_a_layer_that_was_treated(change):
    history = History()
    if change == "treated":
        history.treated = {LAYERS[0]}
    else:
        history.load_state_dict(History().state_dict())
    found = []
    for reading in from_the_start():
        history.add(reading)
        found += EntropyCollapse().check(history)
    told = {issue.layer for issue in found if issue.evidence["from_the_start"]}
    assert told == ({LAYERS[1]} if change == "treated" else set())
