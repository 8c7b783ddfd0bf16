"""When steps are probed, and what is concluded from a few of them."""

import json
import math

import pytest

from stabmon.engine.step_length.probe import StepQuality
from stabmon.engine.step_length.rate_watch import BRISK, DIVERGED, FIRST, LOW, RateWatch

RATES = {"0.0": 1e-3}


def judged(ratios, first=1, rise=-0.1):
    watch, found = RateWatch(), []
    for step, ratio in enumerate(ratios, start=first):
        assert watch.wants(step, RATES)
        found.append(watch.judge(StepQuality(step, ratio, rise), RATES))
    return found


def test_a_healthy_run_is_probed_in_the_first_steps_and_as_its_rate_rises():
    watch, steps = RateWatch(), []
    for step in range(1, 400):
        rates = {"0.0": 1e-3 * min(1, step / 200)}
        if watch.wants(step, rates):
            steps.append(step)
            watch.judge(StepQuality(step, 0.95, -0.01), rates)
    assert steps[:4] == [1, 2, 4, 7]
    assert len(steps) <= 20
    assert steps[-1] <= 200


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([FIRST - 0.01], ["first_step"]),
        ([FIRST + 0.01], ["brisk"]),
        ([BRISK + 0.01], [None]),
        ([0.5, LOW - 0.1, LOW - 0.1, LOW - 0.1], [None, None, None, "steps"]),
        ([0.5, LOW - 0.1, LOW + 0.2, LOW + 0.2], [None] * 4),
        ([0.45, -0.4, 0.45, 0.2, 0.3, 0.1, 0.4, 0.0], [None] * 7 + ["steps"]),
        ([0.45, -0.2, 0.45, 0.45, 0.45, 0.2, 0.45, 0.2], [None] * 7 + ["brisk"]),
        ([0.55, 0.55, 0.55, 0.55, 0.2, 0.2, 0.4, 0.2], [None] * 7 + ["brisk"]),
        ([0.45] * 8, [None] * 8),
        ([math.nan], [None]),
    ],
)
def test_what_a_few_gain_ratios_say(ratios, expected):
    assert judged(ratios) == expected


def test_steps_found_too_long_are_not_said_again_to_be_so_by_a_small_margin():
    watch = RateWatch()
    watch.conclude(1, "steps", RATES, {"0.0": 0.5})
    ratios = enumerate([0.3] * 8, start=2)
    assert [watch.judge(StepQuality(n, each, -0.01), RATES) for n, each in ratios] == [None] * 8


def test_one_step_that_tears_its_own_batch_up_is_enough():
    assert judged([0.5, -1.0], rise=DIVERGED) == ["torn", "torn"]
    assert judged([0.5, -1.0], rise=DIVERGED - 0.01) == [None, None]


def test_the_rate_that_fits_is_no_higher_than_one_that_was_fine():
    watch = RateWatch()
    watch.wants(1, RATES)
    watch.judge(StepQuality(1, 0.9, -0.1), RATES)
    found = watch.conclude(2, "torn", {"0.0": 1e-2}, {"0.0": 0.5})
    assert found.fitting == {"0.0": 1e-3}
    assert (found.rate, found.fitting_rate) == (1e-2, 1e-3)


@pytest.mark.parametrize(("how", "fits"), [("steps", 1e-4), ("torn", 5e-6)])
def test_several_steps_lower_a_rate_by_no_more_than_a_tenth_at_once(how, fits):
    found = RateWatch().conclude(2, how, RATES, {"0.0": 0.005})
    assert found.fitting == {"0.0": pytest.approx(fits)}


def losses(watch, values, first=1):
    return [watch.note_loss(step, value) for step, value in enumerate(values, start=first)]


def test_a_loss_that_leaps_above_all_before_is_told_and_heavy_tails_are_not():
    falling = [5 - 0.1 * step + 0.05 * (-1) ** step for step in range(16)]
    watch = RateWatch()
    watch.wants(1, RATES)
    assert losses(watch, falling) == [None] * 16
    assert losses(watch, [6.5, 3.5, 6.5], first=17) == [None] * 3, "hard batches"
    assert losses(watch, [8.0, 9.0], first=20) == [None, pytest.approx(9.0 / 6.5)]
    watch = RateWatch()
    watch.wants(1, RATES)
    tails = [1.0, 2.5, 0.4, 0.8, 1.9, 0.3, 3.0, 0.6, 1.2, 0.7, 2.2, 0.5, 0.9, 3.3, 4.0, 0.8]
    assert losses(watch, tails) == [None] * len(tails)


@pytest.mark.parametrize(("risen", "told"), [(40, True), (5, False)])
def test_a_leap_long_after_the_rate_rose_is_not_attributed_to_it(risen, told):
    watch = RateWatch()
    watch.wants(1, {"0.0": 1e-4})
    watch.judge(StepQuality(1, 0.9, -0.1), {"0.0": 1e-4})
    watch.wants(risen, {"0.0": 1e-3})
    assert losses(watch, [2.0 + 0.01 * (-1) ** step for step in range(70)]) == [None] * 70
    found = losses(watch, [5.0, 6.0], first=71)
    assert (found[1] is not None) == told


def test_a_loss_below_zero_never_leaps():
    watch = RateWatch()
    watch.wants(1, RATES)
    assert losses(watch, [-0.1] * 20 + [50.0]) == [None] * 21


def test_its_state_goes_through_json():
    watch = RateWatch()
    watch.wants(1, RATES)
    watch.judge(StepQuality(1, 0.5, -0.1), RATES)
    losses(watch, [3.0, 2.0])
    watch.conclude(2, "steps", RATES, {"0.0": 0.5}, gain_ratio=0.1)
    other = RateWatch()
    other.parse_state(json.loads(json.dumps(watch.state_dict())))()
    assert repr(other.state_dict()) == repr(watch.state_dict())
    with pytest.raises(ValueError, match="losses"):
        other.parse_state({**watch.state_dict(), "losses": "x"})
    assert repr(other.state_dict()) == repr(watch.state_dict())
