"""Words on stored runs: verdicts, states, forecasts, differences, and pages made as a run ends."""

import json
from pathlib import Path

import numpy as np
import pytest

from stabmon.records import Reading, StabilityIssue
from stabmon.report.run import at_close
from stabmon.report.run.facts import differences, facts_of
from stabmon.report.run.forecasts import outcomes
from stabmon.report.run.loading import Run, load_run, load_runs
from stabmon.report.run.packing import packed
from stabmon.report.run.page import run_page
from stabmon.report.run.signals import columns, extremes, head_signals
from stabmon.report.run.verdict import has_finding, verdict_of
from stabmon.sinks.jsonl import JsonlSink
from stabmon.sinks.stored.layer_share import LayerShare
from tests.support.small_runs import gpt2
from tests.support.stored_runs import train_into, write_run

LEVELS = {
    "healthy": ("healthy", "Healthy: 12 samples over 12 steps, no alarm."),
    "damaged": ("damaged", "Attention is being damaged: W_q and W_k grow"),
    "broken": ("broken", "The run is broken: "),
    "resumed": ("healthy", "Healthy: 12 samples over 12 steps, no alarm."),
    "killed": ("healthy", "Healthy: 11 samples over 11 steps, no alarm."),
    "empty": ("empty", "Nothing was measured: the records hold no reading."),
}
STATES = {
    "healthy": "The run ended after step 12, ",
    "resumed": "It was resumed 1 time, at step 5.",
    "killed": "The run has no recorded end: it was killed, hangs, or its monitor was not closed, "
    "after step 11; the newest record was written 1 hour ago.",
}


@pytest.mark.parametrize("kind", LEVELS)
def test_a_run_of_each_kind_gets_its_verdict(kind: str, stored: dict[str, Path]) -> None:
    level, headline = LEVELS[kind]
    found = verdict_of(load_run(stored[kind]))
    assert found.level == level
    assert found.headline.startswith(headline)
    assert found.advice
    assert found.state.endswith(".")


@pytest.mark.parametrize("kind", STATES)
def test_how_a_run_ended_is_said(kind: str, stored: dict[str, Path]) -> None:
    assert STATES[kind] in verdict_of(load_run(stored[kind])).state


def test_a_damaged_run_says_since_when_and_gives_code(stored: dict[str, Path]) -> None:
    run = load_run(stored["damaged"])
    opened = next(issue.step for issue in run.records.issues if issue.is_alarm)
    found = verdict_of(run)
    assert found.headline.endswith(f"since step {opened}.")
    assert found.code
    assert "largest score" in found.details[0]
    assert found.looked_at == (
        "Looked at: 2 layers of 4 heads (8 in all), 11 signals each, at 60 sampled steps."
    )


def test_an_intervention_and_a_recovery_are_told(stored: dict[str, Path]) -> None:
    run = load_run(stored["guarded"])
    applied = [each for each in run.records.interventions if each["action"] == "applied"]
    assert applied
    found = verdict_of(run)
    assert found.level in ("recovered", "look")
    assert any(f"At step {applied[-1]['step']} stabmon applied" in each for each in found.details)


def test_a_run_that_writes_now_goes_on(tmp_path: Path) -> None:
    sink = write_run(tmp_path / "now", [Reading(7, 2.0, {"attn": {"max_logit": np.ones(2)}})])
    assert (
        "The run goes on: the newest record is of step 7"
        in verdict_of(load_run(tmp_path / "now")).state
    )
    sink.close()


def test_what_is_not_covered_is_named(tmp_path: Path) -> None:
    train_into(tmp_path / "bare", 4, optimizer=False, rules={"loss_spike": False})
    missing = verdict_of(load_run(tmp_path / "bare")).missing
    assert any("had no optimizer" in each for each in missing)
    assert "rules that were turned off: loss_spike" in missing


def test_the_page_is_written_as_a_run_ends_unless_turned_off(
    tmp_path: Path, stored: dict[str, Path]
) -> None:
    assert "Healthy: 12 samples" in (stored["healthy"] / "stabmon" / "report.html").read_text(
        "utf-8"
    )
    train_into(tmp_path / "off", 2, report=False)
    assert not (tmp_path / "off" / "stabmon" / "report.html").exists()


def test_a_page_that_would_take_too_long_is_left_to_the_command(
    tmp_path: Path, stored: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    records = stored["killed"] / "stabmon"
    monkeypatch.setattr(at_close, "BYTES_PER_SECOND", 10.0)
    assert at_close.write_page_at_close(records, 100.0) is None
    assert not (records / "report.html").exists()
    assert at_close.write_page_at_close(tmp_path, 100.0) is None


def test_a_page_that_cannot_be_written_ends_no_training(tmp_path: Path) -> None:
    (tmp_path / "run" / "stabmon" / "report.html").mkdir(parents=True)
    monitor = train_into(tmp_path / "run", 2)
    assert monitor.errors["write_report"] == 1
    assert monitor.model(input_ids=gpt2().dummy_inputs["input_ids"]).logits.shape[0] > 0


def test_differences_list_outcome_settings_and_nothing_equal(stored: dict[str, Path]) -> None:
    runs = load_runs([(stored["healthy"], None), (stored["guarded"], None)])
    verdicts = [verdict_of(run) for run in runs]
    rows = {name: values for name, *values in differences(runs, verdicts)}
    assert rows["last step"] == ["12", "60"]
    assert rows["interventions"][0] == "0"
    assert any(name.startswith("settings.interventions") for name in rows)
    assert not any(name.startswith(("version.", "model.")) for name in rows)
    assert all(len(set(values)) == 2 for values in rows.values())
    assert dict(facts_of(runs[0]))["model"].startswith("GPT2LMHeadModel")


def test_runs_of_one_name_get_names_and_letters_of_their_own(tmp_path: Path) -> None:
    for root in ("a", "b"):
        write_run(tmp_path / root / "run", [Reading(1, 1.0, {})]).close()
    runs = load_runs([(tmp_path / "a" / "run", None), (tmp_path / "b" / "run", None)])
    assert [(run.letter, run.name) for run in runs] == [("A", "a/run"), ("B", "b/run")]


def test_one_of_several_runs_in_a_folder_can_be_named(tmp_path: Path) -> None:
    reading = Reading(1, 1.0, {"attn": {"max_logit": np.ones(2)}})
    for _ in range(2):
        train_into(tmp_path / "twice", 2)
    newest, first = load_run(tmp_path / "twice"), load_run(tmp_path / "twice", 1)
    assert (newest.number, len(newest.earlier), first.number, len(first.earlier)) == (2, 1, 1, 0)
    with pytest.raises(ValueError, match="#3: the folder holds 2 runs"):
        load_run(tmp_path / "twice", 3)
    assert reading.layers


def forecasting(tmp_path: Path, scores: list[float], *, closed: int | None = None) -> Run:
    """A run whose scores are given by step, with a forecast at step 3: damage at step 8, 6 to 9."""
    readings = [
        Reading(step, 1.0, {"attn": {"max_logit": np.array([1.0, score])}})
        for step, score in enumerate(scores, start=1)
    ]
    sink = write_run(tmp_path / f"run{len(list(tmp_path.iterdir()))}", readings)
    evidence = {"eta_interval": [3.0, 6.0]}
    issue = StabilityIssue(3, "attn", 1, "logit_growth", "warning", 9.0, 1000.0, "", evidence, 5.0)
    sink.write_issue(issue)
    if closed is not None:
        sink.write_issue(
            StabilityIssue(closed, "attn", 1, "logit_growth", "info", 9.0, 9.0, "", state="closed")
        )
    sink.close()
    return load_run(tmp_path / f"run{len(list(tmp_path.iterdir())) - 1}")


def test_a_forecast_is_held_against_what_happened(tmp_path: Path) -> None:
    def said(scores: list[float], **options: int) -> str:
        (outcome,) = outcomes(forecasting(tmp_path, scores, **options))
        assert outcome.expected == "step 8 (6 to 9)"
        return outcome.text

    flat, big = [9.0] * 6, [2000.0] * 3
    assert said([*flat, *big]) == "largest score 1e+03 was met at step 7, within the interval"
    assert "sooner than forecast" in said([9.0] * 3 + big)
    assert "later than forecast" in said([9.0] * 10 + big)
    assert said([9.0] * 12) == "did not come by step 12"
    assert "not overdue yet" in said(flat)
    assert said([9.0] * 12, closed=7) == "did not come: the issue closed at step 7"


def test_columns_keep_events_alone_and_extremes_of_the_rest() -> None:
    starts = columns(1000, [500], 50)
    assert len(starts) <= 50
    assert {500, 501} <= set(starts.tolist())
    values = np.arange(1000.0)[:, None]
    values[123] = 5000.0
    low, high = extremes(values, starts)
    place = np.searchsorted(starts, 123, side="right") - 1
    assert high[place, 0] == 5000.0
    assert low[place, 0] < 124
    assert high[np.searchsorted(starts, 500), 0] == 500.0


def test_layers_that_come_late_and_heads_that_differ_are_kept() -> None:
    readings = [
        Reading(1, None, {"a": {"x": np.array([1.0, 2.0])}}),
        Reading(2, None, {"a": {"x": np.array([3.0, 4.0])}, "b": {"y": np.array([5.0])}}),
    ]
    found = head_signals(readings)
    assert found.layers == (("a", 2), ("b", 1))
    np.testing.assert_array_equal(found.values["x"], [[1, 2, np.nan], [3, 4, np.nan]])
    np.testing.assert_array_equal(found.values["y"], [[np.nan] * 3, [np.nan, np.nan, 5]])
    assert found.head_at(2) == ("b", 0)


def test_a_layer_that_a_line_left_out_keeps_its_last_value_and_the_page_says_so(
    tmp_path: Path,
) -> None:
    layers = {name: {"max_logit": np.array([1.0])} for name in "ab"}
    readings = [
        Reading(step, 1.0, {name: {"max_logit": np.array([float(step)])} for name in layers})
        for step in range(1, 5)
    ]
    (tmp_path / "stabmon").mkdir()
    sink = JsonlSink()
    sink._share = LayerShare(most_values=1)
    sink.open(tmp_path / "stabmon", {})
    for each in readings:
        sink.write_reading(each, {})
    sink.close()
    run = load_run(tmp_path)
    found = run.signals.values["max_logit"]
    np.testing.assert_array_equal(found, [[1, np.nan], [1, 2], [3, 2], [3, 4]])
    assert any("some layers in 4 readings of 4" in words for words in verdict_of(run).missing)


@pytest.mark.long
def test_a_long_run_of_many_heads_stays_within_its_columns(tmp_path: Path) -> None:
    readings = [
        Reading(step, 1.0, {f"{n}": {"max_logit": np.full(96, step)} for n in range(90)})
        for step in range(1, 61)
    ]
    write_run(tmp_path / "wide", readings).close()
    meta = packed([load_run(tmp_path / "wide")])["meta"]["runs"][0]
    assert len(meta["steps"]) == 30
    assert (meta["from"][0], meta["steps"][-1], meta["planes"]) == (1, 60, 2)


def test_findings_are_of_the_asked_severity(stored: dict[str, Path]) -> None:
    assert has_finding(load_run(stored["damaged"]), "error")
    assert not has_finding(load_run(stored["healthy"]), "warning")


def test_a_page_of_equal_records_is_the_same_but_for_ages(stored: dict[str, Path]) -> None:
    run = load_run(stored["healthy"])
    assert run_page([run]) == run_page([run])
    assert json.loads(json.dumps(packed([run])["meta"])) == packed([run])["meta"]
