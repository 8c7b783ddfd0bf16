"""The callback in the real Trainer of transformers."""

import json
import logging
import math
import os

import pytest
import torch
from torch import nn
from torch.nn import functional
from transformers import Trainer, TrainerCallback, TrainingArguments

from stabmon.integrations.transformers import StabilityCallback
from stabmon.sinks import Sink
from stabmon.sinks.reader import read_records
from tests.sinks.test_wandb import rows as wandb_rows
from tests.support.small_runs import (
    Floats,
    Tokens,
    clean,
    gpt2,
    lines,
    llama,
    same_bits,
    same_readings,
    weights,
)
from tests.support.sweeps import sweep

QUIET = {
    "use_cpu": True,
    "disable_tqdm": True,
    "report_to": [],
    "save_strategy": "no",
    "logging_strategy": "no",
    "seed": 0,
}


def trainer_of(folder, callback=None, model=None, cls=Trainer, more=(), data=None, **arguments):
    """A Trainer over small data; 8 steps where nothing else is said."""
    options = (
        QUIET
        | {"max_steps": 8, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
        | arguments
    )
    kept = {name: options.pop(name) for name in ("compute_loss_func",) if name in options}
    callbacks = ([callback] if callback else []) + list(more)
    data = data or Tokens()
    model = model or gpt2(dropout=0.1)
    arguments = TrainingArguments(str(folder), **options)
    return cls(
        model, arguments, train_dataset=data, eval_dataset=Tokens(8), callbacks=callbacks, **kept
    )


def readings(callback):
    return callback.monitor._tracker.history.readings


def test_records_go_to_the_trainers_own_folder_and_scalars_to_its_log(tmp_path):
    callback = StabilityCallback("observe", log_every=4, schedule="fixed")
    assert callback.issues == []
    trainer = trainer_of(tmp_path, callback)
    trainer.train()
    found = lines(tmp_path / "stabmon" / "readings.jsonl")
    assert [each["step"] for each in found] == [4, 8]
    assert list(found[0]["layers"]) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert [step for step, _ in found[1]["losses"]] == [5, 6, 7, 8]
    entries = [each for each in trainer.state.log_history if "attention/max_logit/max" in each]
    assert [each["step"] for each in entries] == [4, 8]
    assert "stability/issues_open" in entries[0]
    assert not [name for name in entries[0] if name.startswith("attention_layers/")]
    assert callback.issues == callback.monitor.issues
    assert clean(trainer.model)
    assert not callback.monitor.errors


def test_a_run_that_dies_just_after_a_checkpoint_goes_on_with_its_state(tmp_path):
    class Dies(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 6:
                raise KeyboardInterrupt

    saves = {"save_strategy": "steps", "save_steps": 3}
    callback = StabilityCallback("observe", log_every=1, schedule="fixed")
    trainer = trainer_of(tmp_path, model=gpt2(), more=[Dies(), callback], **saves)
    with pytest.raises(KeyboardInterrupt):
        trainer.train()
    assert not (tmp_path / "checkpoint-6" / "stabmon_state.json").exists()
    again = StabilityCallback("observe", log_every=1, schedule="fixed")
    trainer = trainer_of(tmp_path, again, gpt2(), **saves)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-6"))
    assert [each.step for each in readings(again)] == list(range(1, 9))
    assert not list(tmp_path.glob("*.next"))
    other = StabilityCallback("observe", log_every=1, schedule="fixed")
    trainer = trainer_of(tmp_path, other, gpt2(), **saves)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert [each.step for each in readings(other)] == list(range(1, 9)), "of its own step"


def test_the_loss_of_a_reading_is_the_one_that_was_differentiated(tmp_path):
    class Keeps(Trainer):
        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            seen.append(loss.item())
            return loss

    for name, options in {
        "plain": {},
        "accumulated": {"gradient_accumulation_steps": 2},
        "own": {
            "compute_loss_func": lambda out, labels, num_items_in_batch: out.logits.square().mean()
        },
    }.items():
        seen = []
        callback = StabilityCallback("observe", log_every=1, sinks=[])
        trainer_of(tmp_path / name, callback, cls=Keeps, max_steps=2, **options).train()
        micro = options.get("gradient_accumulation_steps", 1)
        expected = [sum(seen[i : i + micro]) for i in range(0, len(seen), micro)]
        assert [each.loss for each in readings(callback)] == pytest.approx(expected, rel=1e-6)
        assert readings(callback)[0].micro_batches == micro


def test_tensorboard_and_wandb_get_the_same_scalars_through_the_trainers_reporters(
    tmp_path, monkeypatch
):
    import tensorboard.backend.event_processing.event_accumulator as event_file
    import wandb

    monkeypatch.chdir(tmp_path)  # where W&B writes to
    for name, value in {
        "WANDB_MODE": "offline",
        "WANDB_DIR": tmp_path,
        "WANDB_SILENT": "true",
    }.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = StabilityCallback("observe", log_every=4, schedule="fixed")
    logged, offline = [], []

    class Listens(TrainerCallback):
        def on_train_begin(self, *args, **kwargs):
            offline.append(wandb.run.offline)
            original = wandb.run.log
            monkeypatch.setattr(
                wandb.run,
                "log",
                lambda values, *a, **k: (logged.append(dict(values)), original(values, *a, **k))[1],
            )

    listens = {
        "report_to": ["tensorboard", "wandb"],
        "logging_strategy": "steps",
        "logging_steps": 2,
    }
    trainer_of(tmp_path, callback, more=[Listens()], **listens).train()
    wandb.finish()
    events = event_file.EventAccumulator(str(tmp_path / "events"))
    events.Reload()
    drawn = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
    last = readings(callback)[-1].layers
    for name in ("attention_entropy", "max_logit", "hnf_log_curvature"):
        assert drawn[f"attention/{name}/max"].keys() == {4, 8}
        assert drawn[f"attention/{name}/max"][8] == pytest.approx(
            max(max(each[name]) for each in last.values()), rel=1e-5
        )
        assert {
            f"attention/{name}/mean",
            f"attention/{name}/min",
            f"attention_layers/transformer.h.1.attn/{name}",
        } <= drawn.keys()
    assert {
        "stability/issues_open",
        "stability/alarms",
        "stability/overhead_fraction",
    } <= drawn.keys()
    ours = {row["stabmon/step"]: row for row in logged if "stabmon/step" in row}
    assert ours.keys() == {4, 8}
    assert {name for name in drawn if name.startswith(("attention", "stability"))} <= ours[8].keys()
    assert offline == [True]
    assert not callback.monitor.errors


def test_evaluation_between_steps_is_not_counted_and_training_is_unchanged(tmp_path):
    ends, found = [], []
    for name, options in {"no": {}, "steps": {"eval_strategy": "steps", "eval_steps": 3}}.items():
        callback = StabilityCallback("observe", log_every=4, sinks=[])
        trainer = trainer_of(tmp_path / name, callback, gpt2(), **options)
        trainer.train()
        ends.append(weights(trainer.model))
        found.append([each.layers for each in readings(callback)])
    assert same_bits(*ends)
    assert all(same_readings(left, right) for left, right in zip(*found, strict=True))


def test_accumulated_batches_make_the_reading_of_one_large_batch(tmp_path):
    found = []
    for rows, micro in ((8, 1), (2, 4)):
        callback = StabilityCallback("observe", log_every=2, schedule="fixed", sinks=[])
        options = {
            "per_device_train_batch_size": rows,
            "gradient_accumulation_steps": micro,
            "learning_rate": 0.0,
            "max_steps": 2,
        }
        trainer_of(tmp_path / str(rows), callback, gpt2(), **options).train()
        found += readings(callback)
    assert same_readings(found[0].layers, found[1].layers, 1e-5)
    assert [each.micro_batches for each in found] == [1, 4]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-4)
    assert found[0].gradients[""] == pytest.approx(found[1].gradients[""], rel=1e-3)


def test_gradient_norms_are_those_before_the_trainer_clips(tmp_path):
    callback = StabilityCallback("observe", log_every=1, sinks=[])
    trainer = trainer_of(
        tmp_path,
        callback,
        max_grad_norm=1e-3,
        logging_strategy="steps",
        logging_steps=1,
        max_steps=2,
    )
    trainer.train()
    reported = [each["grad_norm"] for each in trainer.state.log_history if "grad_norm" in each]
    assert [each.gradients[""] for each in readings(callback)] == pytest.approx(reported, rel=1e-5)


def strip(value):
    """A state without wall-clock shares."""
    if isinstance(value, dict):
        timed = ("overhead_fraction", "elapsed", "spent")
        return {name: strip(each) for name, each in value.items() if name not in timed}
    return [strip(each) for each in value] if isinstance(value, list) else value


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path):
    """A rate that harms, so that there are issues to go on with."""
    options = {
        "learning_rate": 1.0,
        "lr_scheduler_type": "constant",
        "max_steps": 60,
        "max_grad_norm": 0.0,
    }
    whole = StabilityCallback("observe", log_every=2, sinks=["jsonl"])
    trainer = trainer_of(tmp_path / "whole", whole, **options)
    trainer.train()
    expected = weights(trainer.model)

    class Stops(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = control.should_training_stop or state.global_step == 31

    first = StabilityCallback("observe", log_every=2, sinks=["jsonl"])
    saves = {"save_strategy": "steps", "save_steps": 31}
    trainer_of(tmp_path / "cut", first, more=[Stops()], **options, **saves).train()
    checkpoint = tmp_path / "cut" / "checkpoint-31"
    assert json.loads((checkpoint / "stabmon_state.json").read_text())["step"] == 31

    second = StabilityCallback("observe", log_every=2, sinks=["jsonl"])
    moved = tmp_path / "elsewhere"  # resumed from another run's folder
    trainer = trainer_of(moved, second, **options)
    trainer.train(resume_from_checkpoint=str(checkpoint))
    assert same_bits(expected, weights(trainer.model))
    assert whole.issues
    assert repr(second.issues) == repr(whole.issues)
    assert repr(second.monitor.open_issues) == repr(whole.monitor.open_issues)
    assert json.dumps(strip(second.monitor.state_dict())) == json.dumps(
        strip(whole.monitor.state_dict())
    )
    assert [each["step"] for each in lines(moved / "stabmon" / "readings.jsonl")] == list(
        range(32, 61, 2)
    )


def test_a_resume_without_a_stored_state_says_so_and_counts_on(tmp_path, caplog):
    trainer_of(tmp_path, None, save_strategy="steps", save_steps=4, max_steps=4).train()
    callback = StabilityCallback("observe", log_every=4, schedule="fixed", sinks=[])
    trainer_of(tmp_path, callback).train(resume_from_checkpoint=True)
    assert [each.step for each in readings(callback)] == [8]
    assert "starts with an empty history" in caplog.text


@pytest.mark.parametrize("options", [{"bf16": True}, {"gradient_checkpointing": True}])
def test_half_precision_and_checkpointing_leave_training_as_it_was(tmp_path, options):
    ends = []
    for callback in (None, StabilityCallback("observe", log_every=3, schedule="fixed", sinks=[])):
        trainer = trainer_of(tmp_path, callback, llama(attention_dropout=0.1), **options)
        trainer.train()
        ends.append(weights(trainer.model))
    assert same_bits(*ends)
    assert len(readings(callback)) == 2
    assert readings(callback)[0].info["model.layers.0.self_attn"].dtype == (
        "bfloat16" if "bf16" in options else "float32"
    )
    assert not callback.monitor.errors


def test_a_wrapped_model_keeps_its_own_names(tmp_path):
    class PeftLike(nn.Module):
        """base_model.model, as PEFT lays it."""

        def __init__(self, model):
            super().__init__()
            self.base_model = nn.Module()
            self.base_model.model = model
            self.base_model.forward = model.forward
            for name, parameter in model.named_parameters():
                parameter.requires_grad = "attn" in name

        def forward(self, input_ids=None, labels=None, **kwargs):
            return self.base_model.model(input_ids=input_ids, labels=labels, **kwargs)

    callback = StabilityCallback("observe", log_every=4, sinks=[])
    trainer_of(tmp_path, callback, PeftLike(gpt2())).train()
    assert list(readings(callback)[0].layers) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert readings(callback)[0].gradients.keys() == {
        "",
        "transformer.h.0.attn",
        "transformer.h.1.attn",
    }


def test_torch_compile_is_measured_and_changes_nothing(tmp_path):
    class Model(Floats):
        def forward(self, x, labels):
            return {"loss": functional.cross_entropy(super().forward(x), labels)}

    data = [
        {"x": torch.randn(6, 32, generator=torch.Generator().manual_seed(i)), "labels": i % 4}
        for i in range(32)
    ]
    ends, graphs = [], []
    for callback in (None, StabilityCallback("observe", log_every=3, schedule="fixed", sinks=[])):
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        trainer = trainer_of(
            tmp_path,
            callback,
            Model(),
            data=data,
            torch_compile=True,
            torch_compile_backend="aot_eager",
        )
        trainer.train()
        ends.append(weights(trainer.model))
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    torch._dynamo.reset()
    assert same_bits(*ends)
    assert graphs[0] == graphs[1]
    assert [list(each.layers) for each in readings(callback)] == [["first", "second"]] * 2
    assert not callback.monitor.errors


def test_a_nan_is_named_at_its_step_though_the_trainer_clips_and_filters_it(tmp_path):
    class Plants(TrainerCallback):
        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step == 4:
                with torch.no_grad():
                    model.transformer.h[1].attn.c_attn.weight[0, 8] = math.nan

    ends = []
    for callback in (None, StabilityCallback("observe", log_every=50)):
        trainer = trainer_of(tmp_path, callback, more=[Plants()])
        trainer.train()
        ends.append(weights(trainer.model))
    assert same_bits(*ends)
    (issue,) = callback.issues
    assert (issue.step, issue.layer, issue.head) == (5, "transformer.h.1.attn.c_attn", 1)
    assert not callback.monitor.errors
    assert [each["step"] for each in lines(tmp_path / "stabmon" / "issues.jsonl")] == [5]


@pytest.mark.parametrize("place", ["forward", "backward", "data"])
def test_after_an_exception_close_leaves_nothing_and_a_second_run_works(tmp_path, place):
    class Fails(TrainerCallback):
        armed = True

        def on_step_begin(self, args, state, control, model=None, **kwargs):
            if state.global_step != 2 or not self.armed:
                return

            def fail(*_):
                handle.remove()
                raise RuntimeError("planted")

            module = model.transformer.h[1].mlp
            handle = (
                module.register_forward_pre_hook(fail)
                if place == "forward"
                else next(module.parameters()).register_hook(fail)
            )

    class BreaksOff(Tokens):
        read = 0

        def __getitem__(self, index):
            self.read += 1
            if place == "data" and fails.armed and self.read > 12:
                raise RuntimeError("planted")
            return super().__getitem__(index)

    fails, callback, model = Fails(), StabilityCallback("observe", log_every=1, sinks=[]), gpt2()
    trainer = trainer_of(tmp_path, callback, model, more=[fails], data=BreaksOff())
    with pytest.raises(RuntimeError, match="planted"):
        trainer.train()
    if place == "forward":
        assert clean(model)
    callback.close()
    assert clean(model)
    fails.armed = False
    trainer.train()
    assert clean(model)
    assert len(readings(callback)) == 8


class CannotOpen(Sink):
    def open(self, run_dir, meta):
        raise PermissionError("closed")


def test_a_callback_that_cannot_start_lets_training_go_on(tmp_path, caplog, monkeypatch):
    callback = StabilityCallback("observe", log_every=2, sinks=[CannotOpen()])
    trainer_of(tmp_path, callback).train()
    assert callback.monitor.errors == {"sink": 1}
    monkeypatch.setattr(
        "stabmon.integrations.transformers.AttentionStabilityMonitor", lambda *_, **__: 1 / 0
    )
    trainer_of(tmp_path, callback).train()
    assert callback.monitor is None
    assert "could not start watching; training goes on without it" in caplog.text


def test_a_configuration_that_cannot_be_is_refused_before_training():
    with pytest.raises(ValueError, match="did you mean 'log_every'"):
        StabilityCallback("observe", log_evry=3)
    assert logging.getLogger("stabmon").level == logging.NOTSET
    assert "WANDB_PROJECT" not in os.environ


class Long(Tokens):
    """Rows long enough for entropies to be judged."""

    def __init__(self, rows=256, length=48):
        self.tokens = torch.randint(
            3, 32, (rows, length), generator=torch.Generator().manual_seed(1)
        )


class Spoils(TrainerCallback):
    """Multiplies W_q and W_k of the first layer after one step."""

    def __init__(self, step=8):
        self.step = step

    def on_optimizer_step(self, args, state, control, model=None, **kwargs):
        if state.global_step + 1 == self.step:
            with torch.no_grad():
                model.transformer.h[0].attn.c_attn.weight[:, :64].mul_(60.0)


def test_guard_clips_under_the_trainer_and_leaves_the_model_clean(tmp_path):
    callback = StabilityCallback("guard", log_every=1)
    trainer = trainer_of(
        tmp_path, callback, more=[Spoils()], data=Long(), max_steps=14, learning_rate=1e-3
    )
    trainer.train()
    assert not callback.monitor.errors
    audit = lines(tmp_path / "stabmon" / "interventions.jsonl")
    assert ("qk_clip", "applied", 9) in [
        (each["intervention"], each["action"], each["step"]) for each in audit
    ]
    assert clean(trainer.model)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


@pytest.mark.parametrize("schedule", sweep(["cosine", "constant_with_warmup"], keep=1))
def test_a_lowered_rate_holds_in_the_trainer_and_through_a_checkpoint_and_resume(
    tmp_path, schedule
):
    def run(folder, guarded, **more):
        options = (
            {
                "interventions": {"lower_learning_rate": {"factor": 0.25}},
                "budget": {"patience": 100},
            }
            if guarded
            else {}
        )
        callback = StabilityCallback("observe", log_every=1, sinks=[], **options)
        given = {
            "max_steps": 14,
            "lr_scheduler_type": schedule,
            "warmup_steps": 2,
            "save_strategy": "steps",
            "save_steps": 11,
        }
        trainer = trainer_of(
            folder, callback, more=[Spoils()], data=Long(), learning_rate=1e-3, optim="sgd", **given
        )
        scheduled, moved = [], []

        class Notes(TrainerCallback):
            """The rate that the scheduler set, and the one that the bias of the last norm moved by:
            SGD's step is rate x gradient.
            """

            def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
                self.before = model.transformer.ln_f.bias.detach().clone()

            def on_optimizer_step(self, args, state, control, model=None, optimizer=None, **kwargs):
                bias = model.transformer.ln_f.bias
                scheduled.append(optimizer.param_groups[0]["lr"])
                moved.append(((self.before - bias).norm() / bias.grad.norm()).item())

        trainer.add_callback(Notes())
        trainer.train(**more)
        assert not callback.monitor.errors
        return callback.monitor.applied, scheduled, moved

    _, plain, _ = run(tmp_path / "plain", guarded=False)
    applied, scheduled, moved = run(tmp_path / "one", guarded=True)
    assert [(each.intervention.name, each.step) for each in applied] == [("lower_learning_rate", 9)]
    assert scheduled == plain, "the scheduler sees its own rates"
    used = [rate * (0.25 if step > 9 else 1.0) for step, rate in enumerate(plain, start=1)]
    assert moved == pytest.approx(used, rel=0.02, abs=1e-9)
    again, scheduled, moved = run(
        tmp_path / "one",
        guarded=True,
        resume_from_checkpoint=str(tmp_path / "one" / "checkpoint-11"),
    )
    assert [each.intervention.name for each in again] == ["lower_learning_rate"]
    assert scheduled == plain[11:]
    assert moved == pytest.approx(used[11:], rel=0.02, abs=1e-9)


def test_a_stop_ends_the_trainer(tmp_path):
    class Poisons(TrainerCallback):
        def on_optimizer_step(self, args, state, control, model=None, **kwargs):
            if state.global_step == 3:
                with torch.no_grad():
                    model.transformer.wte.weight[0, 0] = math.nan

    callback = StabilityCallback("observe", log_every=1, sinks=[], interventions={"stop": {}})
    trainer = trainer_of(tmp_path, callback, more=[Poisons()], max_steps=12)
    trainer.train()
    assert trainer.state.global_step < 8
    assert "non_finite" in callback.monitor.stop_reason


class OwnLoss(Trainer):
    """Takes its loss from the logits or hidden states, as TRL's trainers do, of a model that is
    called with labels.
    """

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        output = model(**inputs, output_hidden_states=True)
        hidden = self.args.run_name == "hidden"
        loss = (
            output.hidden_states[-1].square().mean()
            if hidden
            else -output.logits.log_softmax(-1)[..., 3].mean()
        )
        return (loss, output) if return_outputs else loss


@pytest.mark.parametrize("loss", ["logits", "hidden"])
def test_gradient_norms_are_those_before_clipping_also_of_a_loss_of_the_trainers_own(
    tmp_path, loss
):
    callback = StabilityCallback("observe", log_every=1, sinks=[])
    options = {
        "max_grad_norm": 1e-3,
        "logging_strategy": "steps",
        "logging_steps": 1,
        "max_steps": 2,
        "gradient_accumulation_steps": 2,
    }
    trainer = trainer_of(tmp_path, callback, cls=OwnLoss, run_name=loss, **options)
    trainer.train()
    reported = [each["grad_norm"] for each in trainer.state.log_history if "grad_norm" in each]
    assert [each.gradients[""] for each in readings(callback)] == pytest.approx(reported, rel=1e-5)
    assert not callback.monitor.errors


def test_a_gradient_of_the_trainer_s_own_loss_is_critical_at_once_and_the_loss_is_blamed(tmp_path):
    class Ratio(Trainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            ids = inputs["input_ids"]
            logp = (
                model(input_ids=ids)
                .logits[:, :-1]
                .log_softmax(-1)
                .gather(-1, ids[:, 1:, None])[..., 0]
            )
            old, keep = logp.detach().clone(), torch.ones_like(logp)
            keep[0, -2:] = 0
            old[0, -2:] -= 200.0 if self.state.global_step >= 2 else 0.0
            ratio = torch.exp(logp - old)
            return (-torch.min(ratio, ratio.clamp(0.8, 1.2)) * keep).sum() / keep.sum()

    callback = StabilityCallback("observe", log_every=50, sinks=[])
    trainer_of(tmp_path, callback, cls=Ratio, max_steps=4).train()
    (issue,) = callback.issues
    assert (issue.step, issue.severity, issue.evidence["cause"], issue.evidence["touched"]) == (
        3,
        "critical",
        "objective",
        "weights",
    )
    assert "loss function" in issue.suggestion
    assert "scale" not in issue.suggestion


def poison(model):
    with torch.no_grad():
        model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan


def test_issues_and_records_of_several_trainings_stand_beside_each_other(tmp_path):
    callback = StabilityCallback("observe", log_every=1, sinks=["jsonl"])
    trainer = trainer_of(tmp_path, callback, max_steps=2)
    poison(trainer.model)
    trainer.train()
    first = callback.issues
    assert "non_finite" in {each.issue_type for each in first}
    trainer.train()
    assert len(callback.issues) > len(first)
    assert callback.issues[: len(first)] == first
    records = read_records(tmp_path)
    assert [[each.step for each in run.readings] for run in records.runs] == [[1, 2], [1, 2]]
    assert [each.key for each in records.issues] == [each.key for each in callback.issues]
    assert records.meta["run"] == 2


def test_a_resumed_training_counts_the_issues_of_its_checkpoint_once(tmp_path):
    callback = StabilityCallback("observe", log_every=1, sinks=["jsonl"])
    trainer = trainer_of(tmp_path, callback, max_steps=2, save_strategy="steps", save_steps=1)
    poison(trainer.model)
    trainer.train()
    first = callback.issues
    trainer.args.max_steps = 3
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    keys = [(each.step, each.key, each.state) for each in callback.issues]
    assert len(keys) == len(set(keys))
    assert {(each.step, each.key, each.state) for each in first} <= set(keys)
    assert len(read_records(tmp_path).runs) == 1


def test_a_run_of_wandb_that_the_trainer_made_keeps_the_rows_that_its_user_logs_at_steps_of_their_own(
    tmp_path, monkeypatch
):
    import wandb

    for name, value in {
        "MODE": "offline",
        "SILENT": "true",
        "CONSOLE": "off",
        "X_DISABLE_STATS": "true",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)

    class Logs(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 4 == 0:
                wandb.log({"mine": state.global_step}, step=state.global_step // 4)

    found = []
    for callback in (None, StabilityCallback("observe", log_every=1)):
        folder = tmp_path / str(len(found))
        folder.mkdir()
        monkeypatch.setenv("WANDB_DIR", str(folder))
        trainer_of(folder, callback, more=[Logs()], report_to=["wandb"]).train()
        file = wandb.run.settings.sync_file
        wandb.finish()
        found.append(wandb_rows(file))
    mine = [[(row["_step"], row["mine"]) for row in each if "mine" in row] for each in found]
    assert mine == [[(1, 4), (2, 8)]] * 2
    assert sorted(row["stabmon/step"] for row in found[1] if "stabmon/step" in row) == list(
        range(1, 9)
    )
    assert not callback.monitor.errors


def test_a_trainer_that_makes_no_step_leaves_no_folder(tmp_path):
    callback = StabilityCallback("observe", log_every=1)
    trainer = trainer_of(tmp_path, callback, max_steps=-1, num_train_epochs=0)
    trainer.evaluate()
    trainer.train()
    assert not (tmp_path / "stabmon").exists()
