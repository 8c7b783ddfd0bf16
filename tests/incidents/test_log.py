"""Grouping of issues by cause, from the stream of issues alone."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import replace

from stabmon._storage import strict_json
from stabmon.incidents import Incident, IncidentLog, incidents_of
from stabmon.records import StabilityIssue


def issue(
    step: int,
    kind: str = "logit_growth",
    layer: str | None = "h.0",
    head: int | None = 0,
    severity: str = "error",
    value: float = 90.0,
    **more: object,
) -> StabilityIssue:
    return StabilityIssue(
        step,
        layer,
        head,
        kind,
        severity,
        value,
        48.0,
        f"advice of {kind}",
        **more,  # type: ignore[arg-type]
    )


def rate(step: int, **more: object) -> StabilityIssue:
    evidence = {"fitting_rate": 0.001, "how": "steps", "gain_ratio": -0.1}
    return issue(step, "update_spike", None, None, value=0.03, evidence=evidence, **more)


def closed(of: StabilityIssue, step: int, **more: object) -> StabilityIssue:
    return replace(of, step=step, state="closed", severity="info", **more)  # type: ignore[arg-type]


def test_issues_of_one_symptom_are_one_incident_over_layers_and_heads() -> None:
    heads = [issue(10, layer=f"h.{layer}", head=head) for layer in (0, 9, 10) for head in (0, 1)]
    collapse = [issue(10, "entropy_collapse", layer="h.9", value=0.01)]
    (found,) = IncidentLog().update([*collapse, *heads])
    assert (found.cause, found.state, found.severity) == ("logit_growth", "opened", "error")
    assert found.where == "h.0 … h.10 (3 layers, 6 heads)"
    assert found.effects == "With it: attention entropy collapsed in 1 head"
    assert found.layers == ("h.9", "h.0", "h.10") or set(found.layers) == {"h.0", "h.9", "h.10"}
    assert found.heads == 6
    assert len(found.issues) == 7
    assert found.announced
    assert found.alerts
    assert found.advises


def test_effects_of_an_open_alarm_make_no_incident_of_their_own() -> None:
    log = IncidentLog("transformers")
    log.update([rate(10)])
    (found,) = log.update([issue(20), issue(20, "loss_spike", None, None)])
    assert (found.number, found.cause, found.first_step) == (1, "update_spike", 10)
    assert not found.announced
    assert "attention scores grow in 1 head" in found.effects
    assert "loss jumped" in found.effects
    assert found.code == "TrainingArguments(learning_rate=0.001, ...)"
    assert len(log.all) == 1


def test_a_warning_explains_nothing_of_another_kind() -> None:
    log = IncidentLog()
    log.update([issue(10, severity="warning")])
    found = log.update([issue(20, "loss_spike", None, None)])
    assert [each.number for each in found] == [2]


def test_a_cause_found_later_takes_over_what_it_explains() -> None:
    log = IncidentLog()
    log.update([issue(10)])
    log.update([issue(15, "loss_spike", None, None, severity="warning")])
    (found,) = log.update([rate(20)])
    assert (found.number, found.first_step, found.cause) == (1, 10, "update_spike")
    assert found.announced
    assert found.alerts
    assert found.advises
    assert found.advice == "advice of update_spike"
    assert [each.number for each in log.all] == [1]
    assert [each.number for each in log.open] == [1]


def test_a_nan_with_a_cause_of_its_own_follows_from_nothing() -> None:
    log = IncidentLog()
    log.update([rate(10)])
    nan = {"evidence": {"cause": "mask", "kind": "score"}}
    (own,) = log.update([issue(20, "non_finite", None, None, severity="critical", **nan)])
    assert own.number == 2
    overflow = {"evidence": {"cause": "overflow", "kind": "score"}}
    log.update([closed(own.issues[0], 25)])
    (joined,) = log.update([issue(30, "non_finite", "h.0", 0, severity="critical", **overflow)])
    assert joined.number == 1


def test_an_incident_closes_with_its_last_issue_at_the_value_of_then() -> None:
    log = IncidentLog()
    first, second = issue(10), issue(10, head=1)
    log.update([first, second])
    (still,) = log.update([closed(first, 40)])
    assert still.state == "worsened"
    assert not still.announced
    at_close = {"value": 5.0, "evidence": {"worst_value": 90.0, "opened_at": 10}}
    (gone,) = log.update([closed(second, 50, **at_close)])
    assert (gone.state, gone.severity, gone.number) == ("closed", "info", 1)
    assert gone.numbers == "largest score 5 now, 90 at worst; open for 40 steps"
    assert gone.announced
    assert not gone.alerts
    assert log.open == ()
    assert log.all[0].alarmed


def test_a_cause_that_comes_again_and_again_is_announced_ever_more_rarely() -> None:
    log = IncidentLog()
    announced, alerts = [], 0
    for time in range(1, 17):
        (opened,) = log.update([issue(10 * time)])
        log.update([closed(issue(0), 10 * time + 5)])
        announced += [time] if opened.announced else []
        alerts += opened.alerts
    assert announced == [1, 2, 4, 8, 16]
    assert alerts == 3


def test_a_cause_that_is_over_stays_the_cause_and_explains_nothing_new() -> None:
    log = IncidentLog("transformers")
    log.update([rate(10)])
    log.update([issue(20, "entropy_collapse", value=0.01)])
    (over,) = log.update([closed(rate(10), 30)])
    assert (over.title, over.numbers) == ("learning rate too high", "over since step 30")
    assert over.effects == "Still open: attention entropy collapsed in 1 head"
    assert over.severity == "error"
    assert not over.announced
    (more,) = log.update([issue(40, "entropy_collapse", head=3, value=0.01)])
    assert (more.number, more.cause) == (1, "update_spike")
    growth = {"evidence": {"how": "driven"}}
    (apart,) = log.update([issue(50, head=None, **growth)])
    assert (apart.number, apart.cause) == (2, "logit_growth")
    assert apart.announced
    (again,) = log.update([rate(60)])
    assert again.number == 1
    assert again.numbers.startswith("learning rate 0.03")


def test_a_repetition_stays_unannounced_until_it_is_graver() -> None:
    log = IncidentLog()
    for time in (1, 2):
        log.update([issue(10 * time)])
        log.update([closed(issue(0), 10 * time + 5)])
    third = [
        log.update([issue(30)]),
        log.update([issue(31, state="worsened", value=95.0)]),
        log.update([issue(32, head=5)]),
    ]
    assert not any(change.announced for (change,) in third)
    (closing,) = log.update([closed(issue(0), 33), closed(issue(0, head=5), 33)])
    assert closing.state == "closed"
    assert not closing.announced
    log.update([issue(40)])
    log.update([closed(issue(0), 45)])
    log.update([issue(50)])
    (critical,) = log.update([issue(55, state="worsened", severity="critical")])
    assert critical.announced
    assert critical.advises


def test_warnings_before_it_do_not_keep_an_alarm_back() -> None:
    log = IncidentLog()
    for time in (1, 2, 3):
        log.update([issue(10 * time, severity="warning")])
        log.update([closed(issue(0), 10 * time + 5)])
    (alarm,) = log.update([issue(50)])
    assert alarm.announced
    assert alarm.alerts


def test_only_news_are_announced() -> None:
    log = IncidentLog()
    log.update([issue(10)])
    same = log.update([issue(20, state="worsened", value=150.0)])
    more = log.update([issue(30, layer=f"h.{n}") for n in range(1, 4)])
    worse = log.update([issue(40, state="worsened", severity="critical")])
    far = log.update([issue(50, state="worsened", severity="critical", value=9000.0)])
    assert [each[0].announced for each in (same, more, worse, far)] == [False, True, True, True]
    assert [each[0].alerts for each in (same, more, worse, far)] == [False, False, True, False]
    assert not any(each[0].advises for each in (same, more, worse, far))


def test_a_warning_is_not_announced_until_it_is_an_alarm() -> None:
    log = IncidentLog()
    (warning,) = log.update([issue(10, severity="warning")])
    (alarm,) = log.update([issue(20, state="worsened")])
    assert [warning.announced, warning.alerts, alarm.announced] == [False, False, True]
    assert alarm.state == "worsened"
    assert alarm.advises


def test_live_and_stored_give_the_same() -> None:
    stream = [
        [issue(10, severity="warning")],
        [rate(20), issue(20, head=3)],
        [closed(rate(20), 30)],
    ]
    log = IncidentLog("lightning")
    live = [change for issues in stream for change in log.update(issues)]
    stored = [
        StabilityIssue.from_dict(strict_json.loads(strict_json.dumps(each.to_dict())))
        for issues in stream
        for each in issues
    ]
    assert incidents_of(stored, "lightning") == live


def test_a_record_survives_json() -> None:
    (found,) = incidents_of([issue(10, eta_steps=230.0, evidence={"eta_interval": [120.0, 400.0]})])
    plain = json.loads(json.dumps(found.to_dict()))
    assert Incident.from_dict(plain) == found
    assert found.forecast == "Damage is expected in about 230 steps (120 to 400)"
    assert {field.name for field in dataclasses.fields(found)} == plain.keys()


def test_no_words_name_infinite_limits_or_no_steps() -> None:
    growth = {"value_before": 2.1, "step_before": 110, "growth_per_step": 0.05}
    usual = {"usual_growth_per_step": 0.01}
    (found,) = incidents_of([issue(120, value=10.9, eta_steps=0.2, evidence=growth | usual)])
    assert "largest score 10.9, was 2.1 at step 110" in found.text()
    assert "training makes it grow 1.0% a step, this grew 5.0%" in found.text()
    assert "next few steps" in found.text()
    far = replace(issue(10, "loss_spike", None, None), threshold=3.4e38)
    infinite = replace(issue(10, "loss_spike", None, None), threshold=float("inf"))
    for each in (far, infinite):
        assert "limit" not in incidents_of([each])[0].text()


def test_unknown_types_and_odd_evidence_are_still_said() -> None:
    odd = issue(10, "somebody_elses", evidence={"value_before": "x", "step_before": None})
    (found,) = incidents_of([odd])
    assert found.title == "somebody elses"
    broken = issue(10, "non_finite", None, None, evidence={"first_step": None, "touched": ["?"]})
    assert incidents_of([broken])[0].title
    assert IncidentLog().update([closed(issue(10), 20)]) == []
    assert IncidentLog().update([]) == []
