"""A head whose scores run away is named at once; a head that learns, however sharp, is not."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from stabmon.rules.entropy_collapse import EntropyCollapse
from stabmon.rules.logit_growth import LogitGrowth
from tests.support.trajectories import LAYERS, alarms, falling_loss, readings, run, shape, signals


def jumped(
    times: float,
    entropy_after: float,
    *,
    at: int = 20,
    count: int = 30,
    every: int = 10,
    seed: int = 0,
    before: float = 12.0,
):
    """Flat heads, of which head 2 of layer 1 jumps at reading ``at``."""
    score, entropy = (
        shape(np.full(count, before), 0.05, seed),
        shape(np.full(count, 0.6), 0.02, seed + 1),
    )
    score[at:, 1, 2] *= times
    entropy[at:, 1, 2] = entropy_after
    return readings(
        signals(score, entropy), losses=falling_loss(count * every, seed=seed), every=every
    )


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_a_jump_with_lost_spread_names_the_head_at_the_same_reading(every, seed):
    found = alarms(run(jumped(20.0, 0.02, every=every, seed=seed), [LogitGrowth()]))
    assert [(i.step, i.layer, i.head) for i in found] == [(21 * every, LAYERS[1], 2)]
    assert found[0].evidence["how"] == "jump"
    assert "QK-clip" in found[0].suggestion


@pytest.mark.parametrize(("times", "alarm"), [(3.0, False), (6.5, True)])
def test_the_jump_must_be_beyond_its_level(times, alarm):
    assert bool(alarms(run(jumped(times, 0.05), [LogitGrowth()]))) is alarm


def test_a_jump_that_costs_no_spread_is_a_warning():
    found = run(jumped(20.0, 0.58), [LogitGrowth()])
    assert not alarms(found)
    assert {(i.severity, i.layer, i.head) for i in found} == {("warning", LAYERS[1], 2)}


def test_a_larger_jump_is_asked_of_sparser_readings():
    dense, sparse = jumped(5.5, 0.05, every=5), jumped(5.5, 0.05, every=100)
    assert alarms(run(dense, [LogitGrowth()]))
    assert not alarms(run(sparse, [LogitGrowth()]))


@pytest.mark.parametrize("every", [1, 10])
def test_a_runaway_is_named_while_it_still_doubles(every):
    steps = np.arange(every, 400 + 1, every)
    grown = 20.0 * np.exp(0.04 * np.maximum(0, steps - 150))
    score, entropy = shape(np.full(len(steps), 20.0), 0.05), shape(np.full(len(steps), 0.5), 0.02)
    score[:, 0, 1] = grown
    entropy[:, 0, 1] = np.clip(0.5 * 20.0 / grown, 0.002, 0.5)
    found = alarms(
        run(
            readings(signals(score, entropy), losses=falling_loss(400), every=every),
            [LogitGrowth()],
        )
    )
    assert {(i.layer, i.head) for i in found} == {(LAYERS[0], 1)}
    assert grown[np.searchsorted(steps, found[0].step)] < 400
    assert found[0].eta_steps == pytest.approx(np.log(1000 / found[0].value) / 0.04, rel=0.3)
    low, high = found[0].evidence["eta_interval"]
    assert low <= found[0].eta_steps <= high


@pytest.mark.parametrize("seed", range(3))
def test_a_head_that_sharpens_while_the_loss_falls_and_then_levels_off_gives_no_alarm(seed):
    """The course of a healthy run at ten times its usual rate: 14 to 70 within 80 steps, entropy .4
    to .04.
    """
    steps = np.arange(10, 401, 10)
    turn = 1 / (1 + np.exp(-(steps - 75) / 18.0))
    score, entropy = shape(14 * 5**turn, 0.06, seed), shape(0.4 * 0.1**turn, 0.08, seed + 9)
    watched = readings(
        signals(score, entropy, np.clip(0.65 * shape(turn), 0, 1)),
        losses=falling_loss(400, seed=seed),
    )
    assert not alarms(run(watched, [LogitGrowth()]))


def test_a_score_in_the_thousands_at_the_first_reading_alarms_once_it_still_doubles():
    score, entropy = shape(np.array([5e3, 4e4, 6e4])), shape(np.full(3, 1e-4))
    found = alarms(run(readings(signals(score, entropy), every=50), [LogitGrowth()]))
    assert found[0].step == 100
    assert found[0].evidence["how"] == "harm"


def test_a_pretrained_head_in_the_thousands_that_stays_is_left_alone():
    score, entropy = shape(np.full(60, 1500.0), 0.15), shape(np.full(60, 0.02), 0.2)
    assert not run(readings(signals(score, entropy)), [LogitGrowth()])


def test_growth_from_tiny_scores_is_warm_up():
    steps = np.arange(1, 101)
    score, entropy = (
        shape(0.3 * np.exp(np.minimum(steps, 60) * 0.06), 0.05),
        shape(np.linspace(0.99, 0.7, 100), 0.01),
    )
    assert not run(
        readings(signals(score, entropy), losses=falling_loss(100), every=1), [LogitGrowth()]
    )


def test_one_wild_row_that_leaves_the_entropy_as_it_was_is_no_alarm():
    score, entropy = shape(np.full(30, 12.0), 0.05), shape(np.full(30, 0.6), 0.02)
    score[20, 0, 0] = 400.0
    assert not alarms(run(readings(signals(score, entropy)), [LogitGrowth()]))


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 0.0, -50.0])
def test_scores_that_say_nothing_give_nothing(value):
    watched = readings(signals(np.full((12, 2, 4), value), shape(np.full(12, 0.5))))
    assert not run(watched, [LogitGrowth()])


def test_one_reading_and_missing_signals_give_nothing():
    only_loss = readings({"sink_mass": shape(np.full(9, 0.1))}, losses=falling_loss(90))
    assert not run(only_loss, [LogitGrowth()])
    assert not run(jumped(20.0, 0.02)[:1], [LogitGrowth()])


@given(
    level=st.floats(0.5, 400),
    noise=st.floats(0, 0.25),
    entropy=st.floats(0.01, 0.95),
    every=st.sampled_from([1, 10, 50]),
    seed=st.integers(0, 9),
)
@settings(max_examples=40, deadline=None)
def test_a_steady_head_of_any_level_never_alarms(level, noise, entropy, every, seed):
    score, spread = (
        shape(np.full(60, level), noise, seed),
        shape(np.full(60, entropy), noise, seed + 1),
    )
    assert not alarms(run(readings(signals(score, spread), every=every), [LogitGrowth()]))


def test_where_the_weights_are_frozen_the_advice_is_the_rate_and_no_clip():
    frozen = [
        replace(
            each, info={layer: replace(info, adapted=True) for layer, info in each.info.items()}
        )
        for each in jumped(20.0, 0.02)
    ]
    for rule in (LogitGrowth(), EntropyCollapse()):
        (usual,), (found,) = alarms(run(jumped(20.0, 0.02), [rule])), alarms(run(frozen, [rule]))
        assert (found.step, found.layer, found.head) == (usual.step, usual.layer, usual.head)
        assert found.suggestion.startswith("Lower the learning rate")
        assert "clip" not in found.suggestion.lower()
        assert "clip" in usual.suggestion.lower()
