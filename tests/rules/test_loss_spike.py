"""A loss above its own recent noise: a warning when it passes, an alarm when it stays."""

from dataclasses import replace

import numpy as np
import pytest

from stabmon.records import Overshoot
from stabmon.rules.loss_spike import LossSpike
from tests.support.trajectories import alarms, falling_loss, readings, run, shape


def watched(loss, every=10):
    return readings(
        {"sink_mass": shape(np.full(len(loss) // every, 0.1))}, losses=loss, every=every
    )


def flat(count=300, seed=0, noise=0.05):
    return 2.0 + noise * np.random.default_rng(seed).standard_normal(count)


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_noise_and_a_steep_start_give_nothing(every, seed):
    assert not run(watched(falling_loss(300, start=8, noise=0.1, seed=seed), every), [LossSpike()])


@pytest.mark.parametrize("every", [1, 10, 50])
def test_one_high_loss_is_a_warning_at_its_step(every):
    loss = flat()
    loss[200] = 4.0
    (opened, *_) = run(watched(loss, every), [LossSpike()])
    assert (opened.severity, opened.evidence["spike_step"], opened.value) == ("warning", 201, 4.0)


@pytest.mark.parametrize(("height", "anomalous"), [(2.3, False), (2.8, True)])
def test_a_spike_must_be_beyond_its_level(height, anomalous):
    loss = flat()
    loss[200] = height
    assert bool(run(watched(loss), [LossSpike()])) is anomalous


@pytest.mark.parametrize("every", [1, 10, 50])
def test_a_loss_that_stays_up_is_an_alarm_soon(every):
    loss = flat()
    loss[200:] += 1.5
    found = alarms(run(watched(loss, every), [LossSpike()]))
    assert len(found) == 1
    assert 224 <= found[0].step <= 224 + every


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize(("steps", "is_leap"), [(1, True), (4, False), (20, False)])
def test_a_loss_that_leaps_within_one_step_and_stays_up_is_laid_to_the_data(every, steps, is_leap):
    loss = flat() + 3.0 * np.clip((np.arange(300) - 199) / steps, 0, 1)
    (found,) = alarms(run(watched(loss, every), [LossSpike()]))
    assert found.evidence.get("cause") == ("data" if is_leap else None)
    assert found.evidence.get("leapt_at") == (201 if is_leap else None)
    assert ("leapt at step 201" in found.suggestion) == is_leap


def test_a_leap_after_a_step_that_was_too_long_is_not_laid_to_the_data():
    loss = flat()
    loss[200:] += 3.0
    given = watched(loss, 1)
    given[196] = replace(given[196], overshoot=Overshoot(197, "steps", 0.1, 0.01))
    found = alarms(run(given, [LossSpike()]))
    assert found
    assert "cause" not in found[0].evidence


def test_a_loss_that_comes_down_steadily_is_no_alarm():
    loss = flat()
    loss[200:] += 3.0 * np.exp(-np.arange(100) / 20)
    found = run(watched(loss), [LossSpike()])
    assert found
    assert not alarms(found)


@pytest.mark.parametrize("every", [1, 10, 50])
@pytest.mark.parametrize("seed", range(3))
def test_a_loss_that_turns_up_while_it_still_falls_steeply_is_an_alarm(every, seed):
    loss = falling_loss(300, start=5.5, scale=40, noise=0.1, seed=seed)
    loss[110:] += 1.4
    found = alarms(run(watched(loss, every), [LossSpike()]))
    assert found
    assert 134 <= found[0].step <= 134 + every


def test_a_loss_far_up_is_an_alarm_though_it_comes_down():
    loss = flat()
    loss[200:] += 12.0 * np.exp(-np.arange(100) / 15)
    (found,) = alarms(run(watched(loss), [LossSpike()]))
    assert 224 <= found.step <= 234


def test_a_falling_loss_is_never_a_spike():
    loss = flat()
    loss[200:] -= 1.5
    assert not run(watched(loss), [LossSpike()])


def test_nan_few_and_missing_losses_give_nothing():
    loss = flat()
    loss[200:] = np.nan
    assert not run(watched(loss), [LossSpike()])
    assert not run(watched(np.array([2.0] * 20 + [9.0] * 10)), [LossSpike()])
    assert not run(readings({"sink_mass": shape(np.full(40, 0.1))}), [LossSpike()])
