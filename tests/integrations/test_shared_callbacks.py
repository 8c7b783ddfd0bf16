"""Callbacks that are given twice, shared by two trainers, or used again: said, and records stay
right.
"""

import logging
import threading

import lightning.pytorch as pl
import pytest
import torch
from transformers import TrainerCallback

from stabmon.integrations.lightning import StabilityCallback as LightningCallback
from stabmon.integrations.transformers import StabilityCallback
from stabmon.sinks.reader import read_records
from tests.integrations.test_lightning import Module, fit
from tests.integrations.test_transformers import readings, trainer_of
from tests.support.small_runs import clean, gpt2, lines, same_bits, same_readings, weights

pytestmark = pytest.mark.filterwarnings("ignore")


def warnings_of(caplog):
    return [
        each.getMessage()
        for each in caplog.records
        if each.name == "stabmon" and each.levelno >= logging.WARNING
    ]


def alone(folder, **options):
    """The readings of a run with one callback, and its weights at the end."""
    callback = StabilityCallback("observe", log_every=2, schedule="fixed")
    trainer = trainer_of(folder, callback, gpt2(), **options)
    trainer.train()
    return readings(callback), weights(trainer.model)


def test_one_callback_twice_in_a_trainer_watches_once(tmp_path, caplog):
    options = {"gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps"}
    expected, ends = alone(tmp_path / "once", **options, save_steps=4)
    callback = StabilityCallback("observe", log_every=2, schedule="fixed")
    trainer = trainer_of(
        tmp_path / "twice", callback, gpt2(), more=[callback], **options, save_steps=4
    )
    trainer.train()
    found = readings(callback)
    assert [each.step for each in found] == [2, 4]
    assert [each.losses for each in found] == [each.losses for each in expected]
    assert all(
        same_readings(one.layers, other.layers) for one, other in zip(found, expected, strict=True)
    )
    assert same_bits(weights(trainer.model), ends)
    assert len(read_records(tmp_path / "twice").runs) == 1
    assert (tmp_path / "twice" / "checkpoint-4" / "stabmon_state.json").is_file()
    (said,) = warnings_of(caplog)
    assert "this callback is twice in one trainer" in said
    assert not callback.monitor.errors
    assert clean(trainer.model)


def test_of_two_callbacks_in_a_trainer_the_first_watches(tmp_path, caplog):
    first, second = (StabilityCallback("observe", log_every=2, schedule="fixed") for _ in range(2))
    trainer = trainer_of(tmp_path, first, more=[second], max_steps=4)
    trainer.train()
    assert [each.step for each in readings(first)] == [2, 4]
    assert second.monitor is None
    assert second.issues == []
    records = read_records(tmp_path)
    assert len(records.runs) == 1
    assert records.meta["start"] == 1
    (said,) = warnings_of(caplog)
    assert "two callbacks of stabmon" in said
    assert clean(trainer.model)


def test_a_second_trainer_inside_the_first_does_not_touch_its_records(tmp_path, caplog):
    """As where a callback trains a second model between two steps of the first."""
    callback = StabilityCallback("observe", log_every=2, schedule="fixed")
    inner = []

    class Trains(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                inner.append(trainer_of(tmp_path / "inner", callback, gpt2(), max_steps=5))
                random = torch.get_rng_state()
                inner[0].train()
                torch.set_rng_state(random)

    expected, _ = alone(tmp_path / "alone", max_steps=6)
    trainer = trainer_of(tmp_path / "outer", callback, gpt2(), more=[Trains()], max_steps=6)
    trainer.train()
    assert inner[0].state.global_step == 5
    assert [each.step for each in readings(callback)] == [2, 4, 6]
    for one, other in zip(readings(callback), expected, strict=True):
        assert one.losses == other.losses
        assert same_readings(one.layers, other.layers)
    assert not (tmp_path / "inner" / "stabmon").exists()
    (said,) = warnings_of(caplog)
    assert "shared by two trainers at once" in said
    assert not callback.monitor.errors
    assert clean(trainer.model)
    assert clean(inner[0].model)


def test_a_second_trainer_in_another_thread_does_not_touch_its_records(tmp_path, caplog):
    callback = StabilityCallback("observe", log_every=2, schedule="fixed")
    other = trainer_of(tmp_path / "other", callback, gpt2(), max_steps=5)

    class Waits(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                thread = threading.Thread(target=other.train)
                thread.start()
                thread.join()

    trainer = trainer_of(tmp_path / "first", callback, gpt2(), more=[Waits()], max_steps=6)
    trainer.train()
    assert other.state.global_step == 5
    assert [each["step"] for each in lines(tmp_path / "first/stabmon/readings.jsonl")] == [2, 4, 6]
    assert not (tmp_path / "other" / "stabmon").exists()
    assert ["shared by two trainers" in each for each in warnings_of(caplog)] == [True]
    assert clean(trainer.model)


def test_a_callback_that_is_used_again_says_so_once_and_each_run_is_one_of_its_own(
    tmp_path, caplog
):
    callback = StabilityCallback("observe", log_every=2, schedule="fixed")
    for steps in (2, 4, 6):
        trainer_of(tmp_path, callback, gpt2(), max_steps=steps).train()
    assert [len(run.readings) for run in read_records(tmp_path).runs] == [1, 2, 3]
    (said,) = warnings_of(caplog)
    assert "has watched a training before" in said


def test_a_training_that_raised_is_over_for_the_next_trainer(tmp_path, caplog):
    class Fails(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                raise KeyboardInterrupt

    callback = StabilityCallback("observe", log_every=2, schedule="fixed")
    broken = trainer_of(tmp_path, callback, gpt2(), more=[Fails()], max_steps=6)
    with pytest.raises(KeyboardInterrupt):
        broken.train()
    trainer = trainer_of(tmp_path, callback, gpt2(), max_steps=4)
    trainer.train()
    assert [len(run.readings) for run in read_records(tmp_path).runs] == [1, 2]
    assert not [each for each in warnings_of(caplog) if "shared" in each]
    assert clean(broken.model)
    assert clean(trainer.model)


def test_a_run_shorter_than_the_interval_is_named_as_it_begins(tmp_path, caplog):
    options = {"config": "observe", "schedule": "fixed"}
    trainer_of(tmp_path / "hf", StabilityCallback(**options), max_steps=20).train()
    fit(tmp_path / "pl", Module(), LightningCallback(**options), max_steps=10)
    first, second = warnings_of(caplog)
    assert "log_every=50 and the run ends at step 20; set log_every=2" in first
    assert "log_every=50 and the run ends at step 10; set log_every=1" in second
    caplog.clear()
    fit(tmp_path / "dry", Module(), LightningCallback(**options), fast_dev_run=True)
    trainer_of(tmp_path / "first", StabilityCallback("observe"), max_steps=1).train()
    assert warnings_of(caplog) == []  # the adaptive schedule samples the first step


def test_lightning_itself_refuses_two_callbacks_in_one_trainer(tmp_path):
    for more in (LightningCallback(), None):
        callback = LightningCallback()
        with pytest.raises(RuntimeError, match="more than one stateful callback"):
            fit(tmp_path, Module(), callback, more=[more or callback])


def test_a_lightning_trainer_inside_another_does_not_touch_its_records(tmp_path, caplog):
    callback = LightningCallback("observe", log_every=2, schedule="fixed")
    inner = Module()

    class Fits(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 2:
                fit(tmp_path / "inner", inner, callback, max_steps=5)

    module = Module()
    fit(tmp_path / "outer", module, callback, more=[Fits()], max_steps=6)
    assert [each.step for each in readings(callback)] == [2, 4, 6]
    assert [each["step"] for each in lines(tmp_path / "outer/stabmon/readings.jsonl")] == [2, 4, 6]
    assert not (tmp_path / "inner" / "stabmon").exists()
    (said,) = warnings_of(caplog)
    assert "shared by two trainers at once" in said
    assert clean(module)
    assert clean(inner)
    caplog.clear()
    fit(tmp_path / "again", Module(), callback, max_steps=2)
    assert "has watched a training before" in caplog.text


def test_on_issue_reaches_both_callbacks(tmp_path):
    def poison(model):
        with torch.no_grad():
            model.transformer.h[1].attn.c_attn.weight[0, 0] = float("nan")

    seen = {"hf": [], "pl": []}
    first = StabilityCallback("observe", log_every=1, on_issue=seen["hf"].append)
    trainer = trainer_of(tmp_path / "hf", first, max_steps=1)
    poison(trainer.model)
    trainer.train()
    second = LightningCallback("observe", log_every=1, on_issue=seen["pl"].append)
    module = Module()
    poison(module.model)
    fit(tmp_path / "pl", module, second, max_steps=1)
    assert read_records(tmp_path / "hf").meta["framework"] == "transformers"
    assert read_records(tmp_path / "pl").meta["framework"] == "lightning"
    assert seen["hf"] == first.issues != []
    assert seen["pl"] == second.issues != []
    for callback in (StabilityCallback, LightningCallback):
        with pytest.raises(TypeError, match="on_issue"):
            callback(on_issue=3)
