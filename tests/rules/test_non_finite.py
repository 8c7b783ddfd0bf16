"""NaN and inf are named where they started; a scaler's search is no alarm."""

import math
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest

from stabmon.records import Cause, Reading
from stabmon.rules.non_finite import NonFinite
from stabmon.rules.tracking.history import History
from tests.support.trajectories import LAYERS, bad, falling_loss, readings, run, shape, signals

WELL = readings(
    signals(shape(np.full(8, 8.0)), shape(np.full(8, 0.5))),
    losses=falling_loss(80),
    gradients=[{"": 1.0}] * 8,
)


def with_last(**change):
    return [*WELL[:-1], replace(WELL[-1], **change)]


def test_a_well_run_gives_nothing():
    assert not run(WELL, [NonFinite()])


@pytest.mark.parametrize("kind", ["parameter", "input", "activation", "score", "loss"])
def test_a_traced_tensor_is_critical_and_named(kind):
    losses = ((80, float("nan")),)
    (issue,) = run(
        with_last(non_finite=bad(79, kind), losses=losses, loss=float("nan")), [NonFinite()]
    )
    assert (issue.severity, issue.layer, issue.evidence["tensor"]) == (
        "critical",
        LAYERS[0],
        "output",
    )
    assert issue.evidence["first_step"] == 79


def test_an_infinite_score_names_its_head():
    layers = {
        name: {k: v.copy() for k, v in values.items()} for name, values in WELL[-1].layers.items()
    }
    layers[LAYERS[1]]["max_logit"][3] = np.inf
    (issue,) = run(with_last(layers=layers), [NonFinite()])
    assert (issue.severity, issue.layer, issue.head) == ("critical", LAYERS[1], 3)


@pytest.mark.parametrize("loss", [float("nan"), float("inf")])
def test_a_bad_loss_is_reported_for_the_run_at_its_own_step_and_is_no_alarm_if_training_went_on(
    loss,
):
    (issue,) = run(with_last(losses=((75, 2.0), (76, loss), (80, 2.0))), [NonFinite()])
    assert (issue.severity, issue.layer, issue.step) == ("warning", None, 76)
    assert "go back" not in issue.suggestion.lower()


@pytest.mark.parametrize("gradients", [{}, {"": float("nan")}])
def test_a_bad_loss_is_critical_where_nothing_says_that_the_weights_are_finite(gradients):
    (issue,) = run(
        with_last(losses=((79, 2.0), (80, float("nan"))), gradients=gradients), [NonFinite()]
    )
    assert (issue.severity, issue.step) == ("critical", 80)


@pytest.mark.parametrize(
    ("touched", "skipped", "severity"),
    [
        ("nothing", 0, "warning"),
        ("gradients", 0, "warning"),
        ("gradients", 17, "error"),
        ("gradients", 34, "critical"),
        ("weights", 0, "critical"),
    ],
)
@pytest.mark.parametrize("kind", ["activation", "gradient", "loss"])
def test_the_extent_decides_the_severity(kind, touched, skipped, severity):
    found = replace(
        bad(80, kind),
        touched=touched,
        skipped=skipped,
        search=16 * (skipped > 0),
        cause="objective",
    )
    (issue,) = run(with_last(non_finite=found), [NonFinite()])
    assert (issue.severity, issue.evidence["touched"]) == (severity, touched)
    assert ("Go back" in issue.suggestion) == (touched == "weights")
    assert ("in a row" in issue.suggestion) == (skipped > 0)


def test_each_cause_has_its_own_advice_and_only_a_scalers_finding_names_a_scaler():
    causes = get_args(Cause)
    said = {
        cause: run(with_last(non_finite=replace(bad(80), cause=cause)), [NonFinite()])[0].suggestion
        for cause in causes
    }
    assert len(set(said.values())) == len(causes)
    assert not [cause for cause, words in said.items() if "scaler" in words]
    stuck = replace(
        bad(80), cause="arithmetic", touched="gradients", skipped=17, search=16, scale=0.5
    )
    (issue,) = run(with_last(non_finite=stuck), [NonFinite()])
    assert "scale is down to 0.5" in issue.suggestion


def test_nan_scores_alone_mean_nothing_was_measured():
    assert not run(
        readings(signals(np.full((5, 2, 4), np.nan), shape(np.full(5, 0.5)))), [NonFinite()]
    )


def test_a_bad_gradient_is_a_warning_until_it_stays():
    watched = [*WELL[:4], *(replace(r, gradients={"": float("inf")}) for r in WELL[4:])]
    assert [(i.step, i.severity) for i in run(watched, [NonFinite()])] == [
        (50, "warning"),
        (70, "critical"),
    ]


def test_a_bad_gradient_with_a_bad_loss_is_critical_at_once():
    found = run(
        with_last(non_finite=bad(80, "gradient"), losses=(), loss=float("nan")), [NonFinite()]
    )
    assert [i.severity for i in found] == ["critical"]


def test_an_episode_that_returns_is_an_issue_of_its_own_whatever_the_cooldown():
    watched = list(WELL)
    for at in (2, 3, 6, 7):  # finite again at 4 and 5, for long enough to close
        began = watched[2 if at < 4 else 6].step
        watched[at] = replace(
            watched[at], non_finite=replace(bad(began, "activation"), touched="gradients")
        )
    issues = run(watched, [NonFinite()], cooldown_steps=10_000)
    assert [(each.step, each.state, each.severity) for each in issues] == [
        (watched[2].step, "opened", "warning"),
        (watched[5].step, "closed", "info"),
        (watched[6].step, "opened", "warning"),
    ]
    assert [issues[0].evidence["found_at"], issues[2].evidence["found_at"]] == [
        watched[2].step,
        watched[6].step,
    ]


@pytest.mark.parametrize(
    ("scores", "place"),
    [
        ({"a": [1.0, 2.0], "b": [1.0, math.nan], "c": [math.nan, math.nan]}, ("b", 1)),
        ({"a": [math.nan, math.nan], "b": [1.0, math.nan]}, (None, None)),  # NaN came into a
        ({"a": [1.0, 2.0], "b": [3.0, 4.0]}, (None, None)),
    ],
)
def test_a_gradient_that_was_not_traced_is_placed_by_a_head_that_alone_is_nan(scores, place):
    layers = {name: {"max_logit": np.array(values)} for name, values in scores.items()}
    found = replace(bad(80, "gradient"), layer=None, head=None, touched="weights")
    history = History()
    history.add(Reading(80, 2.0, layers, non_finite=found))
    (issue,) = NonFinite().check(history)
    assert (issue.layer, issue.head, issue.severity) == (*place, "critical")
    assert issue.evidence["kind"] == ("score" if place[0] else "gradient")
