"""A jumped rate is used at what the run had seen before, and nobody but the optimizer's step
knows.
"""

from __future__ import annotations

import pytest
import torch
from torch import nn

from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.cap_learning_rate import CapLearningRate
from stabmon.records import StabilityIssue


def issue(highest: float | None = 0.1) -> StabilityIssue:
    evidence = {} if highest is None else {"highest_rate_before": highest}
    return StabilityIssue(5, None, None, "update_spike", "error", 2.0, 0.4, "", evidence=evidence)


def moved(run: TrainingRun) -> list[float]:
    """The rates that one step of SGD uses, by what it changes."""
    before = [p.detach().clone() for p in run.model.parameters()]
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)
    run.optimizer.step()
    return [
        float((was - now.detach()).flatten()[0])
        for was, now in zip(before, run.model.parameters(), strict=True)
    ]


def make(rate: float = 2.0, other: float = 1.0) -> TrainingRun:
    model = nn.Linear(2, 2)
    groups = [{"params": [model.weight], "lr": rate}, {"params": [model.bias], "lr": other}]
    return TrainingRun(model, torch.optim.SGD(groups, lr=rate))


def test_each_rate_is_capped_and_seen_as_it_was() -> None:
    run = make()
    applied = CapLearningRate().apply(run, issue())
    assert moved(run) == pytest.approx([0.1, 0.1], abs=1e-6)
    assert [group["lr"] for group in run.optimizer.param_groups] == [2.0, 1.0]
    assert applied.record["before"] == {"lr": [2.0, 1.0]}
    assert applied.record["after"]["lr"] == pytest.approx([0.1, 0.1])
    assert applied.effect.was_active()
    assert applied.undo()
    assert moved(run) == pytest.approx([2.0, 1.0], abs=1e-6)


def test_rates_below_the_cap_are_used_as_they_are() -> None:
    run = make()
    applied = CapLearningRate(times=2.0).apply(run, issue())
    for group, rate in zip(run.optimizer.param_groups, (0.15, 0.01), strict=True):
        group["lr"] = rate
    assert moved(run) == pytest.approx([0.15, 0.01], abs=1e-6)
    assert not applied.effect.was_active()


def test_a_cap_of_ones_own_takes_no_issue() -> None:
    run = make()
    CapLearningRate(cap=0.5).apply(run)
    assert moved(run) == pytest.approx([0.5, 0.5], abs=1e-6)


def test_a_rate_too_high_from_the_start_is_held_at_the_one_that_fits() -> None:
    run = make()
    too_high = StabilityIssue(
        5, None, None, "update_spike", "error", 2.0, 0.2, "", evidence={"fitting_rate": 0.2}
    )
    CapLearningRate().apply(run, too_high)
    assert moved(run) == pytest.approx([0.2, 0.2], abs=1e-6)


def test_it_is_held_again_after_a_restart() -> None:
    state = CapLearningRate().apply(make(), issue()).state_dict()
    run = make()
    CapLearningRate().resume(run, state)
    assert moved(run) == pytest.approx([0.1, 0.1], abs=1e-6)


@pytest.mark.parametrize("highest", [None, 0.0])
def test_without_a_rate_before_it_does_not_fit(highest: float | None) -> None:
    with pytest.raises(NotApplicable, match="update_spike"):
        CapLearningRate().apply(make(), issue(highest))


def test_settings_are_checked() -> None:
    with pytest.raises(ValueError, match="times"):
        CapLearningRate(times=0)


def too_long(fitting: dict[str, float], step: int = 0, how: str = "first_step") -> StabilityIssue:
    evidence = {
        "fitting_rates": fitting,
        "fitting_rate": max(fitting.values()),
        "found_at": step,
        "how": how,
    }
    return StabilityIssue(
        step, None, None, "update_spike", "error", 2.0, 0.2, "", evidence=evidence
    )


def test_only_the_group_that_is_too_fast_is_held() -> None:
    run = make()
    CapLearningRate().apply(run, too_long({"0.0": 0.2}))
    assert moved(run) == pytest.approx([0.2, 1.0], abs=1e-6)


def test_two_caps_do_not_add_up() -> None:
    run = make()
    for cap in (0.5, 0.2, 0.4):
        CapLearningRate().apply(run, too_long({"0.0": cap}))
    assert moved(run) == pytest.approx([0.2, 1.0], abs=1e-6)


def test_a_step_at_a_ceiling_is_not_shortened_again_by_the_next() -> None:
    run, shortened = make(), []

    def shorten(factors):  # type: ignore[no-untyped-def]
        shortened.append(factors)
        return lambda: None

    run.shorten_step = shorten
    for _ in range(2):
        CapLearningRate().apply(run, too_long({"0.0": 0.2}))
        assert moved(run) == pytest.approx([0.2, 1.0], abs=1e-6)
    assert shortened == [{"0.0": pytest.approx(0.1)}, {}]


def test_a_group_ahead_of_others_is_held_at_a_multiple_of_their_rate() -> None:
    run = make(rate=40.0)
    evidence = {"fitting_rates": {"0.0": 2.0}, "fitting_multiples": {"0.0": 2.0}}
    ahead = StabilityIssue(5, None, None, "update_spike", "error", 40.0, 2.0, "", evidence=evidence)
    applied = CapLearningRate().apply(run, ahead)
    assert moved(run) == pytest.approx([2.0, 1.0], abs=1e-5)
    assert applied.effect.was_active()
    for rate in (0.5, 3.0):  # the others' schedule, and that of a loop that sets all rates anew
        run.optimizer.param_groups[0]["lr"], run.optimizer.param_groups[1]["lr"] = 40 * rate, rate
        assert moved(run) == pytest.approx([2 * rate, rate], abs=1e-5)
    again = make(rate=40.0)
    CapLearningRate().resume(again, applied.state_dict())
    assert moved(again) == pytest.approx([2.0, 1.0], abs=1e-5)
    run.optimizer.param_groups[0]["lr"] = 1.0  # mended by its owner
    assert moved(run) == pytest.approx([1.0, 3.0], abs=1e-5)
    assert not applied.effect.was_active()


@pytest.mark.parametrize(("how", "step"), [("first_step", 0), ("leap", 0), ("first_step", 1)])
def test_the_step_that_showed_it_is_shortened_unless_the_harm_was_done_before(
    how: str, step: int
) -> None:
    run, shortened = make(), []

    def shorten(factors):  # type: ignore[no-untyped-def]
        shortened.append(factors)
        return lambda: shortened.append("back")

    run.shorten_step = shorten
    applied = CapLearningRate().apply(run, too_long({"0.0": 0.2}, step, how))
    mended = (how, step) == ("first_step", 0)
    assert shortened == ([{"0.0": pytest.approx(0.1)}] if mended else [])
    assert applied.record["after"]["shortened"] == mended
    assert applied.undo()
    assert shortened[1:] == (["back"] if mended else [])


def test_a_cap_stored_before_groups_were_capped_each_by_its_own_is_held_again() -> None:
    run = make()
    CapLearningRate().resume(run, {"effect": {"cap": 0.5}, "step": 3, "record": {}})
    assert moved(run) == pytest.approx([0.5, 0.5], abs=1e-6)
