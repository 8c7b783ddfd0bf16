"""A rate that jumps beyond anything before, and moves the weights with it."""

from dataclasses import replace

import numpy as np
import pytest

from stabmon.records import Overshoot, QKUpdate, Reading
from stabmon.rules.logit_growth import LogitGrowth
from stabmon.rules.update_spike import UpdateSpike
from tests.support.trajectories import alarms, readings, run, shape, signals


def watched(rates, shares, every=10):
    """One reading a rate; each of two layers moves by the share."""
    return [
        Reading(
            step=(i + 1) * every,
            loss=None,
            layers={},
            learning_rate=rate,
            query_key={}
            if share is None
            else {layer: QKUpdate(1.0, 4.0, 4.0 * share) for layer in "ab"},
        )
        for i, (rate, share) in enumerate(zip(rates, shares, strict=True))
    ]


def test_a_jump_of_the_rate_is_an_alarm_at_once_attributed_to_no_head():
    (found,) = alarms(
        run(watched([1e-3] * 8 + [2e-2] * 3, [0.01] * 8 + [0.2] * 3), [UpdateSpike()])
    )
    assert (found.step, found.layer, found.head) == (90, None, None)
    assert found.value == 2e-2
    assert found.threshold == pytest.approx(4e-3)
    assert found.evidence["highest_rate_before"] == 1e-3
    assert found.evidence["query_key_update"] == pytest.approx(0.2)


def test_it_closes_when_the_rate_is_back():
    found = run(
        watched([1e-3] * 8 + [2e-2] * 2 + [1e-3] * 6, [0.01] * 8 + [0.2] * 2 + [0.01] * 6),
        [UpdateSpike()],
    )
    assert [issue.state for issue in found] == ["opened", "closed"]


@pytest.mark.parametrize(
    ("rates", "shares"),
    [
        ([1e-4 * (i + 1) for i in range(20)], [0.1] * 20),  # a warm-up
        ([1e-3 / (1 + i % 7) for i in range(21)], [0.1] * 21),  # warm restarts
        ([1e-3] * 8 + [2e-2] * 4, [0.01] * 12),  # a rate that moves little
        ([1e-3] * 12, [0.02] * 8 + [0.3, 0.02, 0.02, 0.02]),  # one burst
        ([1e-3] * 12, [0.01] * 8 + [0.05] * 4),  # five times as much, which is little still
        ([1e-3] * 12, [0.1] * 8 + [0.4] * 4),
        (
            [1e-3 * (i + 1) for i in range(12)],
            [0.01 * (i + 1) for i in range(12)],
        ),  # a warm-up from nothing
        ([1e-3] * 8 + [2e-2] * 4, [0.1] * 8 + [0.2] * 4),  # as much as usual, about
        ([1e-3] * 2 + [2e-2] * 4, [0.01] * 2 + [0.3] * 4),  # too early to tell
        ([None] * 12, [0.3] * 12),
        ([1e-3] * 8 + [2e-2] * 4, [None] * 12),
        ([float("nan")] * 12, [float("nan")] * 12),
    ],
)
def test_what_healthy_runs_do_gives_nothing(rates, shares):
    assert not run(watched(rates, shares), [UpdateSpike()])


def test_a_high_rate_that_goes_on_is_one_issue_as_long_as_it_moves_much():
    rates, shares = [1e-3] * 8 + [2e-2] * 30, [0.01] * 8 + [0.2] * 10 + [0.01] * 20
    found = run(watched(rates, shares), [UpdateSpike()])
    assert [issue.state for issue in found] == ["opened", "closed"]
    assert replace(found[0]).is_alarm


@pytest.mark.parametrize("share", [0.15, 5.0])
def test_queries_and_keys_that_alone_move_too_far_twice_are_attributed_to_their_layer(share):
    course = watched([1e-3] * 14, [0.02] * 8 + [share] * 6)
    course = [
        replace(r, query_key={"a": r.query_key["a"], "b": QKUpdate(1.0, 4.0, 0.08)}) for r in course
    ]
    found = run(course, [UpdateSpike()])
    assert [(issue.step, issue.layer, issue.head, issue.state) for issue in found] == [
        (100, "a", None, "opened")
    ]
    assert found[0].is_alarm
    assert found[0].evidence["usual_query_key_update"] == pytest.approx(0.02)


def broken(found, at=3):
    """A head that broke at the fourth reading, or at another, beside the weights' steps."""
    score, entropy = shape(np.full(len(found), 5.0)).copy(), shape(np.full(len(found), 0.9)).copy()
    score[at:], entropy[at:] = 400.0, 0.01
    layers = readings(signals(score, entropy))
    return [replace(r, layers=s.layers, info=s.info) for r, s in zip(found, layers, strict=True)]


def test_a_rate_too_high_from_the_start_is_reported_with_the_one_that_fits_once_heads_broke():
    course = watched([2e-2] * 12, [0.1, 0.2, 0.15] + [0.07] * 9)
    assert not alarms(run(course, [UpdateSpike(), LogitGrowth()])), "no head broke"
    found = [
        issue
        for issue in alarms(run(broken(course), [UpdateSpike(), LogitGrowth()]))
        if issue.issue_type == "update_spike"
    ]
    assert [(issue.step, issue.layer, issue.head) for issue in found] == [(50, None, None)]
    assert found[0].evidence["fitting_rate"] == pytest.approx(2e-2 * 0.025 / 0.2)


@pytest.mark.parametrize(
    "shares", [[0.07] * 12, [0.2] + [0.06] * 11, [0.01] * 3 + [0.07] * 9, [float("nan")] * 12]
)
def test_steps_as_in_healthy_runs_give_no_issue_beside_broken_heads(shares):
    found = alarms(run(broken(watched([2e-3] * 12, shares)), [UpdateSpike(), LogitGrowth()]))
    assert {issue.issue_type for issue in found} == {"logit_growth"}


def test_a_layer_closes_when_its_steps_are_small_again():
    found = run(watched([1e-3] * 20, [0.02] * 8 + [0.5] * 4 + [0.02] * 8), [UpdateSpike()])
    assert [issue.state for issue in found] == ["opened", "opened", "closed", "closed"]


def test_weights_that_were_made_smaller_and_are_moved_as_ever_are_no_sign_of_a_rate():
    course = [
        replace(r, query_key={"a": QKUpdate(1.0, 4.0, 0.08)})
        for r in watched([1e-3] * 14, [0.02] * 14)
    ]
    course[8:] = [replace(r, query_key={"a": QKUpdate(1.0, 0.2, 0.08)}) for r in course[8:]]
    assert not run(course, [UpdateSpike()])


def test_a_jump_of_the_rate_is_listed_before_its_consequences_at_the_same_step():
    course = broken(watched([1e-3] * 5 + [2e-2] * 4, [0.01] * 5 + [0.2] * 4), at=5)
    found = alarms(run(course, [LogitGrowth(), UpdateSpike()]))
    assert [issue.issue_type for issue in found if issue.step == 60][:2] == [
        "update_spike",
        "logit_growth",
    ]


def grouped(rates, updates, factors=None):
    """One reading a row of (rates by group), with the share of itself by which each group moved."""
    factors = factors or [{}] * len(rates)
    return [
        Reading(
            (i + 1) * 5,
            None,
            {},
            learning_rate=max(r.values()),
            learning_rates=r,
            rate_factors=f,
            updates=u,
        )
        for i, (r, u, f) in enumerate(zip(rates, updates, factors, strict=True))
    ]


def test_one_group_whose_rate_jumps_is_named_with_its_own_past():
    rates = [{"0.0": 3e-2, "1.0": 3e-4}] * 8 + [{"0.0": 3e-2, "1.0": 6e-3}] * 3
    course = grouped(rates, [{"0.0": 0.002, "1.0": 1e-3}] * 8 + [{"0.0": 0.002, "1.0": 0.02}] * 3)
    (found,) = alarms(run(course, [UpdateSpike()]))
    assert (found.step, found.layer, found.value) == (45, None, 6e-3)
    assert found.evidence["highest_rates_before"] == {"1.0": 3e-4}
    assert "1.0" in found.suggestion


def test_a_jump_closes_while_its_cap_is_held_though_the_schedule_stays_up():
    rates = [{"0.0": 1e-3}] * 8 + [{"0.0": 2e-2}] * 8
    updates = [{"0.0": 0.01}] * 8 + [{"0.0": 0.2}] * 2 + [{"0.0": 0.01}] * 6
    factors = [{}] * 10 + [{"0.0": 0.05}] * 6
    assert [issue.state for issue in run(grouped(rates, updates, factors), [UpdateSpike()])] == [
        "opened",
        "closed",
    ]


def overshoot(how="first_step", step=1, rate=1e-2, fitting=1e-3):
    return Overshoot(step, how, 0.1, -0.1, {"0.0": rate}, {"0.0": fitting})


def test_steps_that_gain_too_little_are_an_alarm_until_the_rate_used_fits():
    course = grouped([{"0.0": 1e-2}] * 12, [{}] * 12, [{}] * 6 + [{"0.0": 0.1}] * 6)
    course[0] = replace(course[0], overshoot=overshoot())
    found = run(course, [UpdateSpike()])
    assert [(issue.step, issue.state) for issue in found] == [(5, "opened"), (40, "closed")]
    assert found[0].evidence["fitting_rates"] == {"0.0": 1e-3}
    assert (found[0].value, found[0].threshold) == (1e-2, 1e-3)
    assert found[0].suggestion.startswith(
        "Lower the rate to 0.001: at 0.01 the first step gained 10%"
    )


def test_a_new_finding_is_reported_anew_with_its_own_rate():
    course = grouped([{"0.0": 1e-2}] * 8, [{}] * 8)
    course[0] = replace(course[0], overshoot=overshoot())
    course[4] = replace(course[4], overshoot=overshoot("torn", 25, fitting=5e-4))
    found = run(course, [UpdateSpike()])
    assert [(issue.step, issue.state, issue.evidence["fitting_rate"]) for issue in found] == [
        (5, "opened", 1e-3),
        (25, "worsened", 5e-4),
    ]


def test_a_brisk_beginning_is_an_issue_only_once_heads_break():
    course = watched([2e-2] * 12, [0.01] * 12)
    course = [replace(each, learning_rates={"0.0": 2e-2}) for each in course]
    course[0] = replace(course[0], overshoot=overshoot("brisk", rate=2e-2))
    assert not run(course, [UpdateSpike(), LogitGrowth()])
    found = [
        issue
        for issue in run(broken(course), [UpdateSpike(), LogitGrowth()])
        if issue.issue_type == "update_spike"
    ]
    assert [issue.evidence["fitting_rate"] for issue in found] == [1e-3]


def ahead(rate, moved, others=1e-3, count=12):
    """Readings of three groups, of which the second holds W_q and W_k; heads break at the fourth."""
    course = watched([rate] * count, [moved] * count)
    return broken(
        [
            replace(
                r,
                learning_rates={"0.0": others, "0.1": rate, "0.2": others},
                updates={"0.0": 0.004, "0.1": moved, "0.2": 0.002},
                query_key_groups=("0.1",),
            )
            for r in course
        ]
    )


def test_the_group_of_queries_and_keys_that_is_ahead_of_all_others_is_named():
    found = run(ahead(3e-2, 0.06), [UpdateSpike(), LogitGrowth()])
    (issue,) = [i for i in found if i.issue_type == "update_spike"]
    assert (issue.layer, issue.is_alarm, issue.value) == (None, True, 3e-2)
    assert issue.evidence["fitting_multiples"] == {"0.1": pytest.approx(30 / 20)}
    assert issue.evidence["fitting_rates"] == {"0.1": pytest.approx(1.5e-3)}
    assert "parameter group 0.1 (" in issue.suggestion


@pytest.mark.parametrize(
    ("rate", "moved"),
    [
        (3e-2, 0.008),  # a rate that moves them little more than the others
        (2e-3, 0.06),  # about the others' rate: it is not the rate
    ],
)
def test_a_group_that_is_not_ahead_by_its_rate_is_not_named(rate, moved):
    found = run(ahead(rate, moved), [UpdateSpike(), LogitGrowth()])
    assert not [i for i in found if "fitting_multiples" in i.evidence]


def test_a_group_at_the_rate_that_fits_is_no_issue_any_more():
    course = ahead(3e-2, 0.06)
    course = [*course[:6], *(replace(r, rate_factors={"0.1": 0.05}) for r in course[6:])]
    found = [
        i for i in run(course, [UpdateSpike(), LogitGrowth()]) if i.issue_type == "update_spike"
    ]
    assert [i.state for i in found] == ["opened", "closed"]
    assert found[-1].value == pytest.approx(1.5e-3)
