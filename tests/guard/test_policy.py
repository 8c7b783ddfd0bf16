"""Check what the policy chooses next, when it judges, and what it gives up."""

import json
from dataclasses import dataclass
from typing import ClassVar

import pytest
from torch import nn

from stabmon.guard.policy import Policy
from stabmon.guard.trials import LEAST_STEPS
from stabmon.interventions import Intervention, NotApplicable, TrainingRun
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.budget import Budget
from stabmon.records import StabilityIssue


@dataclass(frozen=True)
class Plain(Intervention):
    """Changes nothing."""

    treats: ClassVar = {"scores": 10, "loss": 20}

    strength: float = 1.0

    def _start(self, run: TrainingRun) -> Effect:
        return Effect()


class Second(Plain):
    treats: ClassVar = {"scores": 20}


class Costly(Plain):
    treats: ClassVar = {"scores": 30, "loss": 10}
    cost: ClassVar = 0.1


class Whole(Plain):
    treats: ClassVar = {"scores": 40, "loss": 5}
    affects_whole_run: ClassVar = True


class OtherWhole(Plain):
    treats: ClassVar = {"loss": 5, "rate": 1}
    affects_whole_run: ClassVar = True


class Unsuited(Plain):
    treats: ClassVar = {"scores": 1}

    def unsuited(self, run, symptom) -> str:
        return "not at this time"


class After(Plain):
    treats: ClassVar = {}

    def is_due(self, issue, tried) -> bool:
        return any(each.intervention.name == "plain" for each in tried)


class Renewed(Plain):
    treats: ClassVar = {"non_finite": 1}
    renews: ClassVar = True


def policy_of(*kinds: type[Intervention], **limits: int) -> Policy:
    return Policy({kind().name: kind() for kind in kinds}, Budget(**limits))


def alarm(
    head: int | None = 0, kind: str = "logit_growth", layer: str | None = "a", **evidence: object
) -> StabilityIssue:
    return StabilityIssue(
        1, layer, head, kind, "error", 100.0, 10.0, suggestion="look at it", evidence=evidence
    )


LOSS = alarm(None, "loss_spike", None)


@pytest.fixture
def run() -> TrainingRun:
    return TrainingRun(nn.Linear(1, 1))


def apply(policy: Policy, run: TrainingRun, *issues: StabilityIssue) -> str | None:
    """Apply what is proposed; return its name."""
    proposed = policy.propose(issues, run)
    if proposed is None:
        return None
    policy.note_applied(proposed.apply(run))
    return proposed.name


def pass_samples(policy: Policy, run: TrainingRun, count: int, *issues: StabilityIssue) -> list:
    found = []
    for _ in range(count):
        run.step += LEAST_STEPS
        found += policy.judge(issues, run)
    return found


def test_samples_at_each_step_count_as_one_of_a_quiet_run(run) -> None:
    policy = policy_of(Plain)
    apply(policy, run, alarm(0))
    outcomes = []
    waits = LEAST_STEPS * (policy.budget.patience - 1)
    for _ in range(waits + 1):
        run.step += 1
        policy.judge([], run)
        outcomes.append(policy.trials.entries[0].outcome)
    assert outcomes[waits - 1 : waits + 1] == ["pending", "worked"]


# -- the choice


def test_the_first_in_order_is_aimed_at_every_alarm_that_it_comes_next_for(run) -> None:
    policy = policy_of(Second, Plain)
    proposed = policy.propose([alarm(0), alarm(2)], run)
    assert proposed is not None
    assert proposed.name == "plain"
    assert [issue.head for issue in proposed.issues] == [0, 2]
    assert proposed.why == "logit_growth at 2 places, first a head 0"


def test_nothing_is_proposed_without_an_alarm_or_for_one_that_is_being_treated(run) -> None:
    policy = policy_of(Plain, Second)
    assert apply(policy, run) is None
    assert apply(policy, run, alarm(0)) == "plain"
    assert apply(policy, run, alarm(0)) is None
    assert apply(policy, run, alarm(0), alarm(1)) == "plain"
    assert [issue.head for issue in policy.trials.entries[-1].applied.intervention.issues] == [1]


def test_what_did_not_fit_is_not_proposed_there_again(run) -> None:
    policy = policy_of(Plain, Second)
    policy.note_refused(policy.propose([alarm(0)], run), NotApplicable("no"))
    assert apply(policy, run, alarm(0), alarm(1)) == "plain"  # the other head alone
    assert apply(policy, run, alarm(0), alarm(1)) == "second"
    assert "plain failed or did not fit" in run.applied[-1].intervention.why


def test_a_persons_own_with_other_settings_does_not_count(run) -> None:
    policy = policy_of(Plain)
    policy.note_refused(Plain(strength=2.0).aimed_at([alarm(0)]), NotApplicable("no"))
    assert apply(policy, run, alarm(0)) == "plain"


def test_one_that_comes_next_whatever_the_order_goes_first(run) -> None:
    policy = policy_of(Plain, Second, After)
    assert apply(policy, run, alarm(0)) == "plain"
    assert apply(policy, run, alarm(0)) == "after"


def test_two_that_change_the_whole_run_are_not_tried_side_by_side(run) -> None:
    policy = policy_of(Whole, OtherWhole, Plain)
    assert apply(policy, run, LOSS) == "other_whole"
    # scores go before the loss; what is allowed beside it is taken
    assert apply(policy, run, alarm(0)) == "plain"
    assert policy_of(Whole).propose([alarm(1)], run).name == "whole"
    only = policy_of(Whole, OtherWhole)
    only.note_applied(only.propose([LOSS], run).apply(run))
    assert only.propose([alarm(0)], run) is None
    assert not only.untreatable


# -- limits


def test_no_more_than_the_budget_in_a_run(run) -> None:
    policy = policy_of(Plain, Second, max_interventions=2)
    assert [apply(policy, run, alarm(head)) for head in range(3)] == ["plain", "plain", None]
    assert policy.untreatable[("scores", "a", 2)].startswith(
        "all 2 interventions of the budget are spent; "
    )


def test_no_more_than_the_budget_at_a_location(run) -> None:
    policy = policy_of(Plain, Second, Costly, max_per_location=2, patience=1)
    names = []
    for _ in range(3):
        names.append(apply(policy, run, alarm(0)))
        pass_samples(policy, run, 1, alarm(0))
    assert names == ["plain", "second", None]
    assert policy.untreatable[("scores", "a", 0)].startswith(
        "2 interventions were tried here already"
    )
    assert apply(policy, run, alarm(1)) == "plain"


def test_what_does_not_suit_the_run_is_passed_over_and_named_where_nothing_else_is_left(
    run,
) -> None:
    assert apply(policy_of(Unsuited, Plain), run, alarm(0)) == "plain"
    policy = policy_of(Unsuited)
    assert apply(policy, run, alarm(0)) is None
    assert policy.untreatable[("scores", "a", 0)].startswith("not at this time; ")


def test_an_alarm_that_nothing_treats_is_noted_once_with_advice(run) -> None:
    policy = policy_of(OtherWhole)
    apply(policy, run, alarm(0))
    assert policy.untreatable == {
        ("scores", "a", 0): policy.untreatable[("scores", "a", 0)],
    }
    assert "no intervention that is allowed treats this" in policy.untreatable[("scores", "a", 0)]
    policy.note_refused(Plain().aimed_at([alarm(1)]), NotApplicable("no", "x"))
    assert "logit_growth" not in str(policy.untreatable)


def test_the_advice_of_a_refusal_is_passed_on(run) -> None:
    policy = policy_of(Plain)
    policy.note_refused(policy.propose([alarm(0)], run), NotApplicable("it is fused", "split it"))
    assert apply(policy, run, alarm(0)) is None
    assert policy.untreatable[("scores", "a", 0)].endswith("; it is fused: split it")


def test_an_alarm_of_a_rule_without_a_symptom_is_not_dropped_without_a_word(run) -> None:
    policy = policy_of(Plain)
    assert apply(policy, run, alarm(0, "of_nobody")) is None
    assert policy.untreatable[("of_nobody", "a", 0)].endswith("treats it; look at it")


# -- the judgement


def test_it_worked_where_the_alarm_is_gone_after_the_patience(run) -> None:
    policy = policy_of(Plain, patience=3)
    apply(policy, run, alarm(0))
    pass_samples(policy, run, 2, alarm(0))
    assert policy.trials.entries[0].outcome == "pending"
    pass_samples(policy, run, 1)
    assert policy.trials.entries[0].outcome == "worked"
    assert apply(policy, run, alarm(0)) == "plain"  # so it may be tried again


def test_it_failed_where_the_alarm_is_open_after_the_patience_and_the_next_is_tried(run) -> None:
    policy = policy_of(Plain, Second, patience=3)
    apply(policy, run, alarm(0))
    assert pass_samples(policy, run, 3, alarm(0)) == []  # it costs nothing: it stays
    assert policy.trials.entries[0].outcome == "failed"
    assert policy.trials.entries[0].applied.active
    assert apply(policy, run, alarm(0)) == "second"


def test_it_worked_where_it_did_at_one_of_its_heads_and_is_not_tried_at_the_other(run) -> None:
    policy = policy_of(Plain, Second, patience=1)
    apply(policy, run, alarm(0), alarm(1))
    pass_samples(policy, run, 1, alarm(1))
    assert policy.trials.entries[0].outcome == "worked"
    assert apply(policy, run, alarm(0), alarm(1)) == "plain"
    assert [issue.head for issue in run.applied[-1].intervention.issues] == [0]


@pytest.mark.parametrize("by_hand", [False, True])
def test_a_failed_one_that_costs_something_is_to_be_taken_back_unless_it_is_a_persons(
    by_hand, run
) -> None:
    policy = policy_of(Costly, patience=2)
    apply(policy, run, alarm(0))
    run.applied[0].by_user = by_hand
    back = pass_samples(policy, run, 2, alarm(0))
    assert back == ([] if by_hand else policy.trials.entries)
    assert policy.trials.entries[0].outcome == "failed"
    assert ("still open after 2 samples" in policy.trials.entries[0].reason) is not by_hand
    assert pass_samples(policy, run, 5, alarm(0)) == []  # it is said once


def test_one_that_came_to_an_end_by_itself_is_to_be_taken_back_at_once(run) -> None:
    policy = policy_of(Plain, Second, patience=9)
    apply(policy, run, alarm(0))
    run.applied[0].effect.abandoned_reason = "the weight is gone"
    (back,) = pass_samples(policy, run, 1, alarm(0))
    assert back.reason == "the weight is gone"
    back.applied.undo()
    assert apply(policy, run, alarm(0)) == "second"


def test_one_with_nothing_to_do_is_released_after_a_calm_time_and_one_at_work_relaxed(run) -> None:
    policy = policy_of(Plain, patience=1, release_after=3)
    for head in (0, 1):
        apply(policy, run, alarm(head))
    idle, busy = run.applied
    busy.effect.was_active = lambda: True
    relaxed = []
    busy.effect.relax = lambda: relaxed.append(policy.trials.samples) or {"cap": 2.0}
    pass_samples(policy, run, 1)  # judged
    pass_samples(policy, run, 2)
    assert idle.active
    pass_samples(policy, run, 1, alarm(0))  # an alarm begins the calm time anew, for its own
    assert relaxed == [4]
    pass_samples(policy, run, 2)
    assert idle.active
    pass_samples(policy, run, 1)
    assert not idle.active
    assert busy.active
    assert relaxed == [4, 7]


def test_without_leave_nothing_is_released(run) -> None:
    policy = policy_of(Plain, patience=1, release_after=1)
    apply(policy, run, alarm(0))
    for _ in range(5):
        policy.judge([], run, release=False)
    assert run.applied[0].active


def test_a_cause_found_anew_allows_what_was_tried_before(run) -> None:
    policy = policy_of(Renewed, max_per_location=1, patience=1)
    found = alarm(None, "non_finite", None, found_at=1)
    run.step = 2
    assert apply(policy, run, found) == "renewed"
    pass_samples(policy, run, 1, found)
    assert apply(policy, run, found) is None
    assert policy.untreatable
    run.step = 9
    assert apply(policy, run, alarm(None, "non_finite", None, found_at=8)) == "renewed"
    assert not policy.untreatable


# -- the state


def test_a_policy_goes_on_from_its_state(run) -> None:
    policy = policy_of(Plain, Second, patience=2)
    apply(policy, run, alarm(0))
    pass_samples(policy, run, 2, alarm(0))
    apply(policy, run, alarm(1))
    apply(policy, run, alarm(None, "update_spike", None))
    state = json.loads(json.dumps(policy.state_dict(run.applied)))
    other = policy_of(Plain, Second, patience=2)
    take_up = other.parse_state(state, [True, True])
    assert not other.trials.entries
    take_up(run.applied)
    assert other.state_dict(run.applied) == policy.state_dict(run.applied)
    assert apply(other, run, alarm(0)) == "second"


def test_what_is_no_longer_known_is_left_out_with_its_trials(run) -> None:
    policy = policy_of(Plain, Second)
    apply(policy, run, alarm(0))
    policy.note_refused(policy.propose([alarm(1)], run), NotApplicable("no"))
    apply(policy, run, alarm(1))
    state = policy.state_dict(run.applied)
    policy.parse_state(state, [False, True])(run.applied[1:])
    assert [trial.applied.intervention.name for trial in policy.trials.entries] == ["second"]


def test_symptoms_of_earlier_versions_are_known_by_their_new_names(run) -> None:
    policy = policy_of(Plain)
    state = policy.state_dict([]) | {"gave_up": [[["drive", "a", None], "why"]]}
    policy.parse_state(state, [])([])
    assert policy.untreatable == {("sustained_growth", "a", None): "why"}


@pytest.mark.parametrize(
    "change",
    [
        {"samples": "many"},
        {"trials": [[3, [], 0, "worked"]]},
        {"trials": [[0, [], 0, "unsure"]]},
        {"ruled_out": [[["scores", "a"], []]]},
        {"gave_up": [["scores", "words"]]},
    ],
)
def test_what_is_no_state_is_refused_and_changes_nothing(change: dict, run) -> None:
    policy = policy_of(Plain)
    apply(policy, run, alarm(0))
    state = policy.state_dict(run.applied)
    with pytest.raises(ValueError):
        policy.parse_state(state | change, [True])
    assert policy.state_dict(run.applied) == state
