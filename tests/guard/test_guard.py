"""What is chosen for which issue, in which order, how often, and when it is given up."""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import nn

from stabmon.guard import Budget, Guard, make_interventions
from stabmon.guard.trials import LEAST_STEPS
from stabmon.interventions import INTERVENTIONS, Intervention, NotApplicable, TrainingRun
from stabmon.interventions.effects.effect import Effect
from stabmon.records import NonFinite, Reading, StabilityIssue
from stabmon.rules import RULES
from tests.support.intervention_runs import (
    all_bits,
    differences,
    first_layer,
    growth,
    run_of,
    scores_of,
    train_step,
)


def issue(
    kind: str, layer: str | None = None, head: int | None = None, severity: Any = "error"
) -> StabilityIssue:
    return StabilityIssue(1, layer, head, kind, severity, 1.0, 1.0, "")


@dataclass(frozen=True)
class Fake(Intervention):
    """Stands for an act of any name."""

    called: str = ""
    fits: bool = True
    price: float = 0.0

    @property
    def name(self) -> str:
        return self.called

    @property
    def cost(self) -> float:  # type: ignore[override]
        return self.price

    def __getattribute__(self, name: str) -> Any:
        """Declarations are those of the intervention that it is called after."""
        if name in ("affects_whole_run", "ends_round", "renews", "treats", "after"):
            return getattr(INTERVENTIONS[self.called], name)
        if name in ("unsuited", "affordable", "is_due"):
            return functools.partial(getattr(INTERVENTIONS[self.called], name), self)
        return super().__getattribute__(name)

    @property
    def where(self) -> str:
        return "all"

    @property
    def factor(self) -> float:
        return 1.0

    def _start(self, run: TrainingRun) -> Effect:
        if not self.fits:
            raise NotApplicable("it does not fit", "change this line")
        return Effect()


class Sampled(Guard):
    """Each call is a sample far enough from the last to count."""

    def intervene(self, *args: Any) -> list[Any]:
        self.run.step += LEAST_STEPS
        return super().intervene(*args)


def guard_of(*acts: Fake, **budget: Any) -> Guard:
    records: list[dict[str, Any]] = []
    run = TrainingRun(nn.Linear(1, 1), audit=lambda record: records.append(dict(record)))
    run.records = records  # type: ignore[attr-defined]
    return Sampled(
        run,
        {act.called: act for act in acts},
        Budget(**{"patience": 2, "release_after": 3, **budget}),
    )


def names(applied: list[Any]) -> list[str]:
    return [each.intervention.name for each in applied]


ALL = [
    Fake(called=name)
    for name in ("qk_clip", "soften_logits", "lower_learning_rate", "rollback", "stop")
]
HEAD = issue("logit_growth", "a", 1)


def test_every_rule_declares_a_symptom_that_some_intervention_treats() -> None:
    treated = {symptom for _, cls in INTERVENTIONS.items() for symptom in cls.treats}
    for name, cls in RULES.items():
        found = cls.symptom_of(issue(name, "a", 1))
        assert found is not None
        assert found.name in treated, name


def test_every_intervention_treats_a_symptom_or_is_installed_at_the_start() -> None:
    idle = [name for name, cls in INTERVENTIONS.items() if not cls.treats]
    assert idle == ["skip_step"]
    assert INTERVENTIONS["skip_step"].install_at_start


def test_no_two_interventions_claim_the_same_place_for_a_symptom() -> None:
    places = [each for _, cls in INTERVENTIONS.items() for each in cls.treats.items()]
    assert len(places) == len(set(places))


@pytest.mark.parametrize(
    ("issues", "expected"),
    [
        ([HEAD], ["qk_clip"]),
        ([issue("entropy_collapse", "a", 1)], ["qk_clip"]),
        ([issue("loss_spike")], ["rollback"]),
        ([issue("gradient_explosion")], ["rollback"]),
        ([issue("non_finite", severity="critical")], ["rollback"]),
        ([HEAD, issue("loss_spike")], ["qk_clip"]),
        ([HEAD, issue("non_finite", severity="critical")], ["rollback"]),
        ([issue("logit_growth", "a", 1, "warning")], []),
        ([issue("loss_spike", severity="warning")], []),
        ([issue("something_of_somebody_else", "a", 1)], []),
        ([], []),
    ],
)
def test_the_first_choice(issues: list[StabilityIssue], expected: list[str]) -> None:
    assert names(guard_of(*ALL).intervene(issues, True)) == expected


CAPS = [Fake(called=name) for name in ("cap_learning_rate", "cap_query_key_update")]
NORM, LAYER = Fake(called="cap_query_key_norm"), issue("logit_growth", "a")


@pytest.mark.parametrize(
    ("issues", "expected"),
    [
        ([LAYER], ["cap_query_key_norm"]),
        ([LAYER, HEAD], ["cap_query_key_norm", "qk_clip"]),
        ([HEAD, LAYER, issue("logit_growth", "b")], ["cap_query_key_norm", "qk_clip"]),
        ([LAYER, issue("loss_spike")], ["cap_query_key_norm"]),
        ([LAYER, issue("update_spike")], ["cap_learning_rate", "cap_query_key_norm"]),
        ([LAYER, issue("non_finite", severity="critical")], ["rollback"]),
    ],
)
def test_what_drives_a_layer_is_held_beside_what_it_did(
    issues: list[StabilityIssue], expected: list[str]
) -> None:
    guard = guard_of(*ALL, *CAPS, NORM)
    assert names(guard.intervene(issues, True)) == expected
    assert names(guard.intervene(issues, True)) == []


def test_a_drive_that_goes_on_is_met_by_what_is_next() -> None:
    guard = guard_of(*ALL, NORM, patience=2)
    did = [name for _ in range(8) for name in names(guard.intervene([LAYER], True))]
    assert did == ["cap_query_key_norm", "qk_clip", "soften_logits"]


TOO_HIGH = replace(issue("update_spike"), evidence={"fitting_rate": 1e-3})


@pytest.mark.parametrize(
    ("issues", "expected"),
    [
        ([issue("update_spike")], ["cap_learning_rate"]),
        ([issue("update_spike"), HEAD], ["cap_learning_rate", "qk_clip"]),
        ([issue("update_spike"), HEAD, issue("loss_spike")], ["cap_learning_rate", "rollback"]),
        ([issue("update_spike", "a"), HEAD], ["qk_clip", "cap_query_key_update", "rollback"]),
        (
            [issue("update_spike", "a"), issue("update_spike", "b")],
            ["cap_query_key_update", "rollback"],
        ),
        ([issue("update_spike", "a"), issue("loss_spike")], ["cap_query_key_update", "rollback"]),
        ([TOO_HIGH], ["cap_learning_rate", "rollback"]),
        ([TOO_HIGH, HEAD], ["cap_learning_rate", "rollback"]),
    ],
)
def test_steps_that_are_too_large_are_bounded_beside_what_they_did(
    issues: list[StabilityIssue], expected: list[str]
) -> None:
    guard = guard_of(*ALL, *CAPS)
    assert names(guard.intervene(issues, True))[: len(expected)] == expected
    assert "rollback" not in names(guard.intervene(issues, True)), "once"


@pytest.mark.parametrize(
    "budget", [{"max_rollbacks": 0}, {"max_interventions": 1}, {"max_per_location": 1}]
)
def test_to_begin_again_is_within_the_budget(budget: dict[str, int]) -> None:
    assert names(guard_of(*ALL, *CAPS, **budget).intervene([TOO_HIGH], True)) == [
        "cap_learning_rate"
    ]


def test_after_a_rollback_nothing_else_is_done_about_what_was_ill_before() -> None:
    run = run_of("gpt2-sdpa", steps=1)
    guard = Guard(run, make_interventions({"qk_clip": {}, "cap_learning_rate": {}, "rollback": {}}))
    guard.begin()
    train_step(run)
    ill = growth(first_layer(run))
    assert names(guard.intervene([TOO_HIGH, ill], True)) == ["cap_learning_rate", "rollback"]
    assert guard.run.applied[-1].record["after"] == {"state_of_step": 1}


def test_where_nothing_healthy_is_there_to_go_back_to_heads_are_treated_all_the_same() -> None:
    acts = [each for each in ALL if each.called not in ("rollback", "lower_learning_rate")] + CAPS
    done = guard_of(*acts, Fake(called="rollback", fits=False)).intervene(
        [TOO_HIGH, HEAD, issue("loss_spike")], True
    )
    assert "qk_clip" in names(done)


def test_all_heads_that_are_ill_at_once_are_one_act() -> None:
    guard = guard_of(*ALL)
    ill = [issue("logit_growth", "a", head) for head in range(8)] + [
        issue("entropy_collapse", "a", 3)
    ]
    (applied,) = guard.intervene(ill, True)
    assert len(applied.intervention.issues) == 9
    assert "9 places" in applied.record["why"]
    assert guard.intervene(ill, True) == [], "then wait and see"


def test_what_failed_is_not_repeated_and_the_next_is_tried_until_none_is_left() -> None:
    guard = guard_of(*ALL, max_per_location=10)
    done = [names(guard.intervene([HEAD], True)) for _ in range(12)]
    assert done[::2] == [["qk_clip"], ["soften_logits"], ["lower_learning_rate"], [], [], []]
    assert not any(done[1::2])
    gave_up = [record for record in guard.run.records if record["action"] == "gave_up"]
    assert len(gave_up) == 1
    assert (gave_up[0]["layer"], gave_up[0]["head"]) == ("a", 1)
    assert "failed or did not fit" in gave_up[0]["why"]
    assert "rms_norm" in gave_up[0]["why"], "the line to change is told"


def test_what_does_not_fit_is_told_and_the_next_is_tried_at_once() -> None:
    guard = guard_of(Fake(called="qk_clip", fits=False), Fake(called="soften_logits"))
    assert names(guard.intervene([HEAD], True)) == ["soften_logits"]
    refused = guard.run.records[0]
    assert (refused["action"], refused["why"], refused["note"]) == (
        "refused",
        "it does not fit",
        "change this line",
    )
    assert (refused["layer"], refused["head"]) == ("a", 1)


def test_an_act_with_a_fault_of_its_own_is_no_fault_of_training() -> None:
    class Broken(Fake):
        def _start(self, run: TrainingRun) -> Effect:
            raise ZeroDivisionError("oops")

    guard = guard_of(Broken(called="qk_clip"), Fake(called="soften_logits"))
    assert names(guard.intervene([HEAD], True)) == ["soften_logits"]
    assert "oops" in guard.run.records[0]["why"]


def test_what_worked_may_be_used_again_within_the_budget() -> None:
    guard = guard_of(*ALL, max_per_location=2)
    done = []
    for _ in range(4):
        done += names(guard.intervene([HEAD], True))
        for _ in range(3):
            guard.intervene([], True)
    assert done == ["qk_clip", "qk_clip"]
    (gave_up,) = [record for record in guard.run.records if record["action"] == "gave_up"]
    assert "2 interventions were tried here already" in gave_up["why"]


def test_a_failed_act_that_costs_a_healthy_run_something_is_taken_back_and_a_free_one_stays() -> (
    None
):
    guard = guard_of(Fake(called="qk_clip"), Fake(called="lower_learning_rate", price=0.17))
    for _ in range(7):
        guard.intervene([HEAD], True)
    assert [(each.intervention.name, each.active) for each in guard.run.applied] == [
        ("qk_clip", True),
        ("lower_learning_rate", False),
    ]


def test_what_is_held_is_let_go_when_all_has_been_well_for_a_while() -> None:
    guard = guard_of(*ALL)
    (applied,) = guard.intervene([HEAD], True)
    active = []
    for _ in range(6):
        guard.intervene([], True)
        active.append(applied.active)
    assert active == [True] * 4 + [False] * 2
    assert guard.run.records[-1]["action"] == "released"


def test_what_is_held_and_still_at_work_is_held_less_tightly_when_all_has_been_well_for_a_while() -> (
    None
):
    class Busy(Effect):
        relaxed = 0

        def was_active(self) -> bool:
            return True

        def relax(self) -> dict[str, Any]:
            self.relaxed += 1
            return {"score": self.relaxed} if self.relaxed < 3 else {}

    guard = guard_of(*ALL)
    (applied,) = guard.intervene([HEAD], True)
    applied.effect = Busy()
    for _ in range(16):
        guard.intervene([], True)
    assert applied.active
    assert [(r["action"], r["after"]) for r in guard.run.records[1:]] == [
        ("relaxed", {"score": 1}),
        ("relaxed", {"score": 2}),
    ]
    for _ in range(16):
        guard.intervene([HEAD], True)
    assert applied.effect.relaxed == 4, "not while an alarm is open"


def test_no_more_acts_than_the_budget_in_all() -> None:
    guard = guard_of(*ALL, max_interventions=2)
    for n in range(5):
        guard.intervene([issue("logit_growth", "a", n)], True)
    assert len(guard.run.applied) == 2
    assert "all 2 interventions of the budget are spent" in guard.run.records[-1]["why"]


def test_rollbacks_are_counted_and_then_the_run_is_stopped_only_if_that_is_allowed() -> None:
    bad = issue("non_finite", severity="critical")
    done = []
    guard = guard_of(*ALL, max_rollbacks=2, max_per_location=10)
    for _ in range(3):
        done += names(guard.intervene([bad], True))
        for _ in range(3):
            guard.intervene([], True)
    assert done == ["rollback", "rollback", "stop"]
    guard = guard_of(Fake(called="rollback"), max_rollbacks=1)
    for _ in range(5):
        guard.intervene([bad], True)
    assert "first bad tensor" in guard.run.records[-1]["why"]


@pytest.mark.parametrize(
    ("touched", "skipped", "cause", "expected"),
    [
        ("nothing", 0, "objective", []),
        ("gradients", 17, "objective", []),
        ("gradients", 34, "objective", ["stop"]),
        ("gradients", 0, "arithmetic", []),
        ("gradients", 17, "arithmetic", ["rollback"]),
        ("gradients", 17, "overflow", ["rollback"]),
        ("weights", 0, "objective", ["rollback"]),
        ("", 0, "objective", ["rollback"]),
    ],
)
def test_nothing_is_gone_back_from_while_weights_are_finite_and_steps_are_made(
    touched: Any, skipped: int, cause: Any, expected: list[str]
) -> None:
    guard = guard_of(*ALL)
    found = NonFinite(
        1,
        "gradient",
        None,
        None,
        "all gradients",
        "",
        cause,
        touched,
        skipped,
        16 * (skipped > 0),
    )
    guard.run.history.add(Reading(1, 1.0, {}, non_finite=found))
    bad = replace(
        issue("non_finite"), suggestion="Clamp the ratio.", evidence={"cause": "objective"}
    )
    assert names(guard.intervene([bad], False)) == expected
    said = [record["why"] for record in guard.run.records if record["action"] == "gave_up"]  # type: ignore[attr-defined]
    assert said == (
        []
        if expected
        else ["the weights are finite, so that a rollback repairs nothing; Clamp the ratio."]
    )


def test_one_act_on_the_whole_run_at_a_time() -> None:
    guard = guard_of(Fake(called="rollback"), Fake(called="lower_learning_rate"))
    assert names(guard.intervene([issue("loss_spike")], True)) == ["rollback"]
    assert names(guard.intervene([issue("loss_spike"), HEAD], True)) == []


def test_the_rate_is_never_brought_below_the_least() -> None:
    run = run_of("gpt2-sdpa")
    guard = Guard(
        run,
        make_interventions({"lower_learning_rate": {"factor": 0.3}}),
        Budget(min_lr_scale=0.1, max_per_location=10, patience=1),
    )
    for n in range(4):
        guard.intervene([issue("logit_growth", "somewhere", n)], True)
        guard.intervene([], True)
    assert run.rates.factor == pytest.approx(0.3)
    assert len(run.applied) == 1


def test_a_head_on_its_way_back_is_not_treated_again() -> None:
    guard = guarded()
    layer = first_layer(guard.run)
    now = guard.run.max_logit(layer, 1)
    assert guard.intervene([replace(growth(layer), threshold=now * 1.1)], True) == []
    assert len(guard.intervene([replace(growth(layer), threshold=now * 0.9)], True)) == 1


def test_dropout_and_the_like_are_chosen_only_if_they_are_named_and_only_last() -> None:
    guard = guard_of(Fake(called="increase_dropout"), Fake(called="qk_clip"))
    done = [names(guard.intervene([HEAD], True)) for _ in range(4)]
    assert [name for each in done for name in each] == ["qk_clip", "increase_dropout"]


CONFIG = {
    "qk_clip": {"target": 0.5},
    "soften_logits": {},
    "lower_learning_rate": {"factor": 0.1, "where": "query_key"},
    "skip_step": None,
    "rollback": {"every": 1, "confirm": 0},
}


def guarded(name: str = "gpt2-sdpa") -> Guard:
    guard = Guard(run_of(name, steps=1), make_interventions(CONFIG), Budget())
    guard.begin()
    return guard


def test_on_a_real_run_it_clips_holds_and_leaves_the_model_as_it_was_on_close() -> None:
    guard = guarded()
    run = guard.run
    hooks = {n: v for n, v in all_bits(run).items() if "hooks" in n}
    layer = first_layer(run)
    before = float(scores_of(run)[layer][1])
    alarm = replace(growth(layer), threshold=before / 2)
    (applied,) = guard.intervene([alarm], True)
    assert applied.intervention.name == "qk_clip"
    assert scores_of(run)[layer][1] == pytest.approx(0.5, rel=1e-5)
    assert guard.wants_attention
    train_step(run)
    guard.close()
    guard.close()
    assert not guard.wants_attention
    assert differences(hooks, {n: v for n, v in all_bits(run).items() if "hooks" in n}) == []


def test_all_goes_on_after_a_restart() -> None:
    guard = guarded()
    run = guard.run
    layer = first_layer(run)
    before = float(scores_of(run)[layer][1])
    alarm = replace(growth(layer), threshold=before / 2)
    guard.intervene([alarm], True)
    state = json.loads(json.dumps(guard.state_dict()))
    fresh = guarded()
    fresh.run.model.load_state_dict(run.model.state_dict())
    fresh.load_state_dict(state)
    assert [each.intervention.name for each in fresh.run.applied] == ["skip_step", "qk_clip"]
    assert fresh.wants_attention
    assert fresh.intervene([alarm], True) == [], "it still waits to see what the clip did"
    assert json.loads(json.dumps(fresh.state_dict()))["applied"] == state["applied"]
    held = fresh.run.applied[1]
    assert not held.undo(), "the bits of before are gone with the old process"
    assert scores_of(fresh.run)[layer][1] == pytest.approx(before, rel=1e-5)


def test_healthy_states_are_kept_only_while_nothing_is_wrong() -> None:
    guard = guarded()
    run = guard.run
    assert run.prepared
    began = run.prepared[0].newest
    assert began is not None, "that in which training begins"
    guard.intervene([growth("elsewhere", None)], True)
    guard.intervene([], False)
    assert run.prepared[0].newest is began
    guard.intervene([], True)
    guard.intervene([], True)
    guard.intervene([], True)
    assert run.prepared[0].newest not in (began, None)


def test_an_idle_guard_changes_no_bit_of_training() -> None:
    plain, guard = run_of("gpt2-sdpa", steps=1), guarded()
    for _ in range(3):
        train_step(plain)
        train_step(guard.run)
        guard.intervene([], True)
    assert differences(all_bits(plain), all_bits(guard.run)) == []


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({"qk_klip": {}}, "did you mean 'qk_clip'"),
        ({"qk_clip": {"tau": 3}}, "interventions.qk_clip.tau: unknown key. Known: target"),
        ({"qk_clip": 3}, "interventions.qk_clip: 3 must map settings"),
        ({"extend_warmup": {"steps": 0}}, "extend_warmup.steps: 0"),
    ],
)
def test_a_wrong_configuration_names_the_key_and_the_mend(
    named: dict[str, Any], words: str
) -> None:
    with pytest.raises(ValueError) as error:
        make_interventions(named)
    assert words in str(error.value)


def test_false_leaves_one_out() -> None:
    assert list(make_interventions({"qk_clip": False, "stop": True})) == ["stop"]


@pytest.mark.parametrize(
    "wrong", [{"max_interventions": -1}, {"patience": 0}, {"min_lr_scale": 0}, {"min_lr_scale": 2}]
)
def test_a_wrong_budget_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"budget.{next(iter(wrong))}"):
        Budget(**wrong)


def test_the_global_random_generator_is_left_alone() -> None:
    guard = guarded()
    state = torch.get_rng_state()
    guard.intervene([growth(first_layer(guard.run))], True)
    assert torch.equal(state, torch.get_rng_state())
