"""A stored state is taken up whole, or refused and the monitor left as it was."""

import copy
import json
import logging
from pathlib import Path

import pytest
import torch

import stabmon
from stabmon._storage.stored_value import Stored
from stabmon.interventions import INTERVENTIONS
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.interventions.run.snapshots import Snapshot
from stabmon.records import StabilityIssue
from tests.support.small_runs import batches as some_batches
from tests.support.small_runs import gpt2, llama, optimizer_of, same_bits, train, weights
from tests.support.sweeps import sweep

STATES = Path(__file__).parents[1] / "states"
LAYER = "transformer.h.0.attn"


def guarded(model=None, folder=None, **options):
    model = gpt2() if model is None else model
    more = {
        "signals": ["max_logit", "normalized_entropy"],
        "history": 4,
        "sinks": [],
        "log_every": 2,
    } | options
    return stabmon.AttentionStabilityMonitor(
        model, optimizer_of(model), config="guard", run_dir=folder, **more
    )


def run_under_guard(**model):
    """A monitor with skip_step in place, a held clip and a lower rate, after six steps."""
    monitor = guarded(gpt2(**model))
    train(monitor.model, monitor, monitor.optimizer, some_batches(6))
    grew = StabilityIssue(6, LAYER, 1, "logit_growth", "error", 9.0, 1.0, "clip", {})
    assert monitor.apply(INTERVENTIONS["qk_clip"](target=0.01).aimed_at([grew]))
    assert monitor.apply(INTERVENTIONS["lower_learning_rate"](factor=0.5, where="query_key"))
    assert not monitor.errors
    return monitor


@pytest.fixture(scope="module")
def stored():
    """The state of such a run, as JSON."""
    monitor = run_under_guard()
    state = text(monitor)
    monitor.close()
    return state


def names(monitor):
    return [each.intervention.name for each in monitor.applied if each.active]


def skips_nan(monitor):
    """Whether a step with a NaN gradient leaves the weights as they are."""
    before = weights(monitor.model)
    loss = monitor.model(input_ids=some_batches(1)[0], labels=some_batches(1)[0]).loss
    (loss * float("nan")).backward()
    monitor.optimizer.step()
    monitor.optimizer.zero_grad()
    return same_bits(before, weights(monitor.model))


def text(monitor):
    return json.dumps(monitor.state_dict())


def leaves(value, path=()):
    """Paths of everything in a state that is below its root."""
    inner = (
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    )
    for name, each in inner:
        yield (*path, name)
        yield from leaves(each, (*path, name))


def changed(state, path, value=None, delete=False):
    state = copy.deepcopy(state)
    owner = state
    for name in path[:-1]:
        owner = owner[name]
    if delete:
        del owner[path[-1]]
    else:
        owner[path[-1]] = value
    return state


@pytest.mark.parametrize("first", sweep(range(4), keep=1))
def test_no_damage_to_a_state_changes_a_monitor_that_refuses_it(first, caplog):
    """Damage each fourth place, beginning at ``first``."""
    monitor = run_under_guard(n_layer=1)
    whole = text(monitor)
    good = json.loads(whole)
    refused = taken = 0
    for at, path in list(enumerate(leaves(good)))[first::4]:
        for damage in (
            {"delete": True},
            {"value": ("?", -7.5, None, {"?": []}, [], True, 1e999)[at % 7]},
        ):
            words = ""
            try:
                monitor.load_state_dict(changed(good, path, **damage))
            except ValueError as error:
                words = str(error)
            if words:
                refused += 1
                assert "\n" not in words, path
                assert text(monitor) == whole, path
            else:
                taken += 1
                monitor.load_state_dict(good)
    assert refused > 1.5 * taken > 0
    assert not monitor.errors
    assert not [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert text(monitor) == whole
    assert names(monitor) == ["skip_step", "qk_clip", "lower_learning_rate"]
    assert skips_nan(monitor)
    monitor.close()


def test_what_is_missing_is_named(stored):
    monitor = guarded()
    for path in (
        ("step",),
        ("tracker",),
        ("guard",),
        ("losses",),
        ("tracker", "history", "signals", "max_logit", "rows", "float64"),
        ("tracker", "history", "readings", 0, "step"),
        ("guard", "applied", 1, "effect", "aims"),
        ("guard", "applied", 1, "effect", "rows", 0),
        ("guard", "chooser", "trials", 0),
        ("guard", "told"),
    ):
        with pytest.raises(ValueError, match=r"give what state_dict\(\) returned") as error:
            monitor.load_state_dict(changed(json.loads(stored), path, value=object()))
        assert ".".join(map(str, path)) in str(error.value)
    monitor.close()


def test_an_array_that_is_cut_off_is_refused(stored):
    monitor = guarded()
    state = json.loads(stored)
    packed = state["tracker"]["history"]["signals"]["max_logit"]["rows"]
    packed["float64"] = packed["float64"][: len(packed["float64"]) // 8 * 4]
    with pytest.raises(ValueError, match="cut off"):
        monitor.load_state_dict(state)
    monitor.close()


@pytest.mark.parametrize(
    "state", [{}, [], 3, None, "x", {"step": 3}, {"version": "x"}, {"version": 1, "tracker": []}]
)
def test_what_is_no_state_is_refused_before_and_during_training(state):
    monitor = guarded()
    with pytest.raises(ValueError, match="no monitor's state"):
        monitor.load_state_dict(state)
    train(monitor.model, monitor, monitor.optimizer, some_batches(2))
    with pytest.raises(ValueError, match="no monitor's state"):
        monitor.load_state_dict(state)
    assert skips_nan(monitor)
    assert not monitor.errors
    monitor.close()


def test_a_state_of_a_later_version_says_to_update(stored):
    monitor = guarded()
    whole = text(monitor)
    with pytest.raises(
        ValueError, match=r"a state of version 2, but this stabmon reads up to 1: update stabmon"
    ):
        monitor.load_state_dict({**json.loads(stored), "version": 2})
    assert text(monitor) == whole
    monitor.close()


@pytest.mark.parametrize(
    ("build", "model_is_stored"),
    [
        (llama, True),
        (lambda: gpt2(n_head=2), True),
        (lambda: gpt2(n_embd=16), True),
        (lambda: gpt2(n_layer=1), True),
        (llama, False),
        (lambda: gpt2(n_layer=1), False),
    ],
)
def test_a_state_of_another_model_is_refused(build, model_is_stored, stored):
    state = json.loads(stored)
    if not model_is_stored:  # states without a version tell layers by their names alone
        del state["model"], state["version"]
    other = guarded(build())
    before = text(other)
    with pytest.raises(ValueError, match="a state of another model"):
        other.load_state_dict(state)
    assert text(other) == before
    other.close()


LATER = {
    "adapted": False,
    "overshoot": None,
    "learning_rates": {},
    "rate_factors": {},
    "updates": {},
    "parts": {},
    "risk": {},
    "weight_decays": {},
    "query_key_groups": [],
    "rank_losses": [],
    "count": 4,
    "has_first": False,  # of a history that was full
    "treated": [],
    "exp_dtype": None,
    "sampled": True,
}
"""What states of before there were versions do not have, and what is read in its place."""


def without_new(now, then):
    """A part of a state without what the same part did not have then, which must be what is read
    where it is missing.
    """
    if isinstance(now, list):
        return (
            [without_new(*each) for each in zip(now, then, strict=True)]
            if isinstance(then, list)
            else now
        )
    if not isinstance(now, dict):
        return now
    new = {key: value for key, value in now.items() if key not in then}
    assert new == {key: LATER[key] for key in new}
    return {key: without_new(value, then[key]) for key, value in now.items() if key in then}


@pytest.mark.parametrize("name", ["transformers_0", "lightning_0"])
def test_states_of_before_there_were_versions_are_taken_up(name, caplog):
    state = json.loads((STATES / f"{name}.json").read_text())
    model = gpt2()
    if name.startswith("lightning"):
        (state,) = state.values()
        model, inner = torch.nn.Module(), model
        model.model, model.forward = inner, inner.forward
    monitor = guarded(model)
    monitor.load_state_dict(state)
    assert monitor.step == 8
    assert names(monitor) == ["skip_step", "qk_clip", "lower_learning_rate"]
    assert [reading.step for reading in monitor._tracker.history.readings] == [2, 4, 6, 8]
    again = json.loads(text(monitor))
    for part in ("issues", "tracker", "losses", "non_finite"):
        now, then = without_new(again[part], state[part]), state[part]
        assert json.dumps(now, sort_keys=True) == json.dumps(then, sort_keys=True)
    assert again["version"] == 1
    assert skips_nan(monitor)
    assert not monitor.errors
    assert "Left out" not in caplog.text
    monitor.close()


def test_what_is_no_longer_known_is_left_out_alone_and_told_of_once(caplog, stored):
    state = json.loads(stored)
    guard, tracker = state["guard"], state["tracker"]
    gone = copy.deepcopy(guard["applied"][1]) | {"intervention": "qk_klip"}
    guard["applied"].insert(1, gone)
    guard["chooser"]["trials"] = [
        [1, [], 0, "worked"],
        *([at + 1, *rest] for at, *rest in guard["chooser"]["trials"]),
    ]
    guard["applied"][2]["settings"]["softness"] = 3
    issue = StabilityIssue(6, LAYER, 1, "melting", "error", 9.0, 1.0, "cool it", {}).to_dict()
    state["issues"].append(issue)
    tracker["open"].append({"issue": issue, "rule": "melting", "since": 6, "absent": 0})
    signals, readings = tracker["history"]["signals"], tracker["history"]["readings"]
    signals["heat"] = signals["max_logit"]
    readings[-1]["layers"][LAYER].append("heat")

    monitor = guarded()
    with caplog.at_level(logging.INFO):
        monitor.load_state_dict(state)
    (told,) = [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]
    for word in ("'qk_klip'", "softness", "'melting'", "heat"):
        assert word in told
    assert names(monitor) == ["skip_step", "qk_clip", "lower_learning_rate"]
    assert [trial.applied.intervention.name for trial in monitor._guard.policy.trials.entries] == [
        "qk_clip",
        "lower_learning_rate",
    ]
    assert len(monitor._tracker.history.readings) == 4
    assert not [
        each for each in (*monitor.issues, *monitor.open_issues) if each.issue_type == "melting"
    ]
    train(monitor.model, monitor, monitor.optimizer, some_batches(4))
    assert skips_nan(monitor)
    assert not monitor.errors
    monitor.close()


def test_a_state_without_the_standing_acts_does_not_take_them_away():
    watched = stabmon.AttentionStabilityMonitor(gpt2(), log_every=2, sinks=[])
    train(watched.model, watched, optimizer_of(watched.model), some_batches(4))
    monitor = guarded(signals=None)
    monitor.load_state_dict(json.loads(text(watched)))
    assert names(monitor) == ["skip_step"]
    assert skips_nan(monitor)
    for each in (watched, monitor):
        each.close()


@pytest.mark.parametrize(
    "named",
    [
        *("/outside/healthy-2-rank0.pt", "../outside/healthy-2-rank0.pt", "healthy-3-rank0.pt"),
        *("notes.txt", "meta.json", "..", "", "a\0b", "x" * 5000),
    ],
)
def test_no_file_outside_the_runs_folder_is_followed_or_deleted(tmp_path, named, caplog):
    outside, run_dir = tmp_path / "outside", tmp_path / "run" / "stabmon"
    outside.mkdir()
    run_dir.mkdir(parents=True)
    precious = outside / "healthy-2-rank0.pt"
    precious.write_text("precious")
    (run_dir / "healthy-3-rank0.pt").symlink_to(precious)
    for name in ("notes.txt", "meta.json"):
        (run_dir / name).write_text("mine")
    monitor = guarded(
        folder=tmp_path / "run",
        interventions={"rollback": {"memory_gb": 0.0, "every": 1, "confirm": 1}},
    )
    state = monitor.state_dict()
    state["guard"]["states"] = {
        "healthy": named.replace("/outside", str(outside)) if named.startswith("/") else named
    }
    monitor.load_state_dict(state)
    assert caplog.text.count("Left out of the resumed state") == 1
    train(monitor.model, monitor, monitor.optimizer, some_batches(6))
    monitor.close()
    assert precious.read_text() == "precious"
    assert all((run_dir / name).read_text() == "mine" for name in ("notes.txt", "meta.json"))


def test_a_healthy_state_in_the_runs_folder_is_found_by_its_name_and_by_the_whole_path_of_older_states(
    tmp_path,
):
    monitor = guarded(folder=tmp_path)
    run = monitor._guard.run
    run.run_dir.mkdir(exist_ok=True)
    path = run.run_dir / "healthy-2-rank0.pt"
    Snapshot.take(run).save(path)
    for named in (path.name, str(path)):
        states = HealthyStates(run)
        states.parse_state(Stored({"healthy": named}))()
        assert states.newest is not None
        assert states.state_dict()["healthy"] == path.name
    monitor.close()
