"""The callback in the real Trainer of Lightning."""

import csv
import json
import logging
import math

import lightning.pytorch as pl
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stabmon.integrations.lightning import StabilityCallback
from stabmon.sinks.reader import read_records
from tests.sinks.test_wandb import rows as wandb_rows
from tests.support.small_runs import (
    Attention,
    Tokens,
    clean,
    gpt2,
    lines,
    same_bits,
    same_readings,
    weights,
)

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
pytestmark = pytest.mark.filterwarnings("ignore")


class Module(pl.LightningModule):
    """GPT-2 in Lightning."""

    def __init__(self, dropout=0.0, rate=1e-2):
        super().__init__()
        self.model, self.rate, self.seen = gpt2(dropout), rate, []

    def training_step(self, batch, _):
        loss = self.model(**batch).loss
        self.seen.append(loss.item())
        return loss

    def validation_step(self, batch, _):
        self.log("validation", self.model(**batch).loss)

    def configure_optimizers(self):
        return torch.optim.AdamW(self.parameters(), self.rate)


def fit(
    folder, module, callback=None, more=(), ckpt_path=None, rows=64, batch=4, data=None, **options
):
    """8 steps where nothing else is said; gives the trainer."""
    given = {
        "accelerator": "cpu",
        "devices": 1,
        "max_steps": 8,
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "limit_val_batches": 0,
        "num_sanity_val_steps": 0,
        "gradient_clip_val": 1.0,
        "log_every_n_steps": 2,
    }
    callbacks = ([callback] if callback else []) + list(more)
    if (
        any(isinstance(each, float | int) for each in [options.get("gradient_clip_val", 0)])
        and not module.automatic_optimization
    ):
        given.pop("gradient_clip_val")
    torch.manual_seed(3)
    trainer = pl.Trainer(**(given | options), default_root_dir=folder, callbacks=callbacks)
    trainer.fit(
        module,
        data or DataLoader(Tokens(rows), batch),
        DataLoader(Tokens(8), 4),
        ckpt_path=ckpt_path,
        weights_only=False,
    )
    return trainer


def readings(callback):
    return callback.monitor._tracker.history.readings


def test_records_go_to_the_trainers_own_folder(tmp_path):
    callback, module = StabilityCallback("observe", log_every=4, schedule="fixed"), Module()
    fit(tmp_path, module, callback)
    found = lines(tmp_path / "stabmon" / "readings.jsonl")
    assert [each["step"] for each in found] == [4, 8]
    assert list(found[0]["layers"]) == ["model.transformer.h.0.attn", "model.transformer.h.1.attn"]
    assert [loss for _, loss in found[0]["losses"]] == pytest.approx(module.seen[:4], rel=1e-6)
    assert callback.issues == callback.monitor.issues == []
    assert not callback.monitor.errors
    assert clean(module)


def test_the_trainers_own_loggers_get_the_scalars(tmp_path, monkeypatch):
    import tensorboard.backend.event_processing.event_accumulator as event_file
    import wandb
    from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger, WandbLogger

    monkeypatch.chdir(tmp_path)  # where W&B writes to
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}.items():
        monkeypatch.setenv(name, value)
    loggers = [
        TensorBoardLogger(tmp_path, "board", "v"),
        CSVLogger(tmp_path, "table", "v"),
        WandbLogger(save_dir=tmp_path, offline=True),
    ]
    logged = []
    original = type(loggers[2].experiment).log
    monkeypatch.setattr(
        type(loggers[2].experiment),
        "log",
        lambda run, values, *a, **k: (logged.append(values), original(run, values, *a, **k))[1],
    )
    callback = StabilityCallback("observe", log_every=4, schedule="fixed")
    trainer = fit(tmp_path, Module(), callback, logger=loggers)
    wandb.finish()
    assert callback.monitor.run_dir == tmp_path / "board" / "v" / "stabmon"
    assert trainer.log_dir == str(tmp_path / "board" / "v")
    events = event_file.EventAccumulator(trainer.log_dir)
    events.Reload()
    drawn = {
        name: {event.step: event.value for event in events.Scalars(name)}
        for name in events.Tags()["scalars"]
    }
    with open(tmp_path / "table" / "v" / "metrics.csv") as file:
        table = {
            int(row["step"]): row
            for row in csv.DictReader(file)
            if row.get("attention/max_logit/max")
        }
    ours = {row["stabmon/step"]: row for row in logged if "stabmon/step" in row}
    assert table.keys() == ours.keys() == {4, 8}
    for name in (
        "attention/max_logit/max",
        "attention/attention_entropy/mean",
        "stability/issues_open",
        "attention_layers/model.transformer.h.0.attn/max_logit",
    ):
        values = [drawn[name][8], float(table[8][name]), ours[8][name]]
        assert values == pytest.approx([values[0]] * 3, rel=1e-5)
    assert not callback.monitor.errors


def test_validation_and_the_sanity_check_are_not_counted(tmp_path):
    found, ends = [], []
    for options in (
        {},
        {"limit_val_batches": 2, "num_sanity_val_steps": 2, "val_check_interval": 3},
    ):
        callback, module = (
            StabilityCallback("observe", log_every=2, schedule="fixed", sinks=[]),
            Module(),
        )
        fit(tmp_path, module, callback, **options)
        found.append([each.layers for each in readings(callback)])
        ends.append(weights(module))
    assert len(found[0]) == 4
    assert all(same_readings(*pair) for pair in zip(*found, strict=True))
    assert same_bits(*ends)


def test_accumulated_batches_make_the_reading_of_one_large_batch(tmp_path):
    found = []
    for rows, micro in ((8, 1), (2, 4)):
        callback = StabilityCallback("observe", log_every=2, schedule="fixed", sinks=[])
        fit(
            tmp_path,
            Module(rate=0.0),
            callback,
            batch=rows,
            accumulate_grad_batches=micro,
            max_steps=2,
        )
        found += readings(callback)
    assert [each.step for each in found] == [2, 2]
    assert same_readings(found[0].layers, found[1].layers, 1e-5)
    assert [each.micro_batches for each in found] == [1, 4]
    assert found[0].loss == pytest.approx(found[1].loss, rel=1e-4)
    assert found[0].gradients[""] == pytest.approx(found[1].gradients[""], rel=1e-3)


def test_a_model_that_lightning_leaves_in_eval_mode_is_watched(tmp_path):
    callback, module = (
        StabilityCallback("observe", log_every=4, schedule="fixed", sinks=[]),
        Module(),
    )
    module.model.eval()  # as from_pretrained gives it
    fit(tmp_path, module, callback)
    assert len(readings(callback)) == 2
    assert not callback.monitor.errors


class Loose(pl.LightningModule):
    """A module that calls its blocks itself, and has no forward."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.blocks, self.head = (
            nn.Embedding(32, 32),
            nn.ModuleList([Attention(), Attention()]),
            nn.Linear(32, 32),
        )

    def training_step(self, batch, _):
        x = self.embed(batch["input_ids"])
        for block in self.blocks:
            x = x + block(x)
        return nn.functional.cross_entropy(self.head(x).flatten(0, 1), batch["labels"].flatten())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), 0.1)


def test_blocks_in_a_list_called_by_the_training_step_are_watched_and_a_nan_in_them_named(tmp_path):
    class Plants(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            if index == 4:
                with torch.no_grad():
                    module.blocks[1].q.weight[9, 0] = math.nan

    ends = []
    for callback in (None, StabilityCallback("observe", log_every=3, sinks=[])):
        module = Loose()
        fit(tmp_path, module, callback, more=[Plants()])
        ends.append(weights(module))
    assert same_bits(*ends)
    assert list(readings(callback)[0].layers) == ["blocks.0", "blocks.1"]
    assert readings(callback)[0].micro_batches == 1
    assert [(each.step, each.layer, each.head) for each in callback.issues] == [
        (5, "blocks.1.q", 1)
    ]
    assert not callback.monitor.errors


class TwoOptimizers(Module):
    """Two optimizers stepped by hand in each batch."""

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        for optimizer in self.optimizers():
            loss = self.model(**batch).loss
            optimizer.zero_grad()
            self.manual_backward(loss)
            optimizer.step()

    def configure_optimizers(self):
        layers = self.model.transformer.h
        return [
            torch.optim.SGD(layers[0].parameters(), 0.1),
            torch.optim.SGD(layers[1].parameters(), 0.1),
        ]


def test_two_optimizers_stepped_by_hand_make_one_step_a_batch(tmp_path):
    ends = []
    for callback in (None, StabilityCallback("observe", log_every=2, schedule="fixed", sinks=[])):
        module = TwoOptimizers()
        fit(tmp_path, module, callback, max_steps=12)
        ends.append(weights(module))
    assert same_bits(*ends)
    assert [each.step for each in readings(callback)] == [2, 4, 6]
    assert not callback.monitor.errors


class ClipsByHand(TwoOptimizers):
    """Manual optimisation with a loss of its own, clipped before each of two optimizers; notes the
    norm right before.
    """

    def __init__(self):
        super().__init__()
        self.before = []

    def training_step(self, batch, _):
        norms = []
        for optimizer in self.optimizers():
            optimizer.zero_grad()
            self.manual_backward(
                self.model(**batch).logits.square().mean(),
                inputs=optimizer.param_groups[0]["params"],
            )
            gradients = [parameter.grad for parameter in optimizer.param_groups[0]["params"]]
            norms.append(torch.cat([each.flatten() for each in gradients]).norm().item())
            self.clip_gradients(optimizer, gradient_clip_val=1e-3, gradient_clip_algorithm="norm")
            optimizer.step()
        self.before.append(math.hypot(*norms))


def test_gradient_norms_are_those_before_the_user_clips_by_hand(tmp_path):
    callback, module = StabilityCallback("observe", log_every=1, sinks=[]), ClipsByHand()
    fit(tmp_path, module, callback, max_steps=4)
    assert [each.gradients[""] for each in readings(callback)] == pytest.approx(
        module.before, rel=1e-5
    )
    assert not callback.monitor.errors


def strip(value):
    """A state without wall-clock shares."""
    if isinstance(value, dict):
        timed = ("overhead_fraction", "elapsed", "spent")
        return {name: strip(each) for name, each in value.items() if name not in timed}
    return [strip(each) for each in value] if isinstance(value, list) else value


def test_a_resumed_run_goes_on_as_the_uninterrupted_one(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    options = {
        "gradient_clip_val": None,
        "rows": 124,
    }  # the cut is at the end of an epoch: Lightning goes on with the next
    whole, module = StabilityCallback("observe", log_every=2, sinks=[]), Module(rate=1.0)
    fit(tmp_path, module, whole, max_steps=60, **options)
    save = ModelCheckpoint(tmp_path, "at", every_n_train_steps=31, save_top_k=-1)
    fit(
        tmp_path,
        Module(rate=1.0),
        StabilityCallback("observe", log_every=2, sinks=[]),
        more=[save],
        max_steps=31,
        enable_checkpointing=True,
        **options,
    )
    second, resumed = StabilityCallback("observe", log_every=2, sinks=[]), Module(rate=1.0)
    fit(tmp_path, resumed, second, max_steps=60, ckpt_path=str(tmp_path / "at.ckpt"), **options)
    assert same_bits(weights(module), weights(resumed))
    assert whole.issues
    assert repr(second.issues) == repr(whole.issues)
    assert json.dumps(strip(second.monitor.state_dict())) == json.dumps(
        strip(whole.monitor.state_dict())
    )


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("place", ["forward", "backward", "batch end"])
def test_an_exception_in_training_leaves_nothing_behind(tmp_path, place, error):
    class Fails(pl.Callback):
        def on_train_batch_start(self, trainer, module, batch, index):
            def fail(*_):
                handle.remove()
                raise error("planted")

            if index == 3 and place != "batch end":
                inner = module.model.transformer.h[1].mlp
                hooked = next(inner.parameters())
                handle = (
                    inner.register_forward_pre_hook(fail)
                    if place == "forward"
                    else hooked.register_hook(fail)
                )

        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if index == 3 and place == "batch end":
                raise error("planted")

    callback, module = StabilityCallback("observe", log_every=1, sinks=[]), Module()
    with pytest.raises((RuntimeError, SystemExit, KeyboardInterrupt)):
        fit(tmp_path, module, callback, more=[Fails()])
    assert clean(module)
    assert len(readings(callback)) >= 3


def test_a_dry_run_and_a_second_fit_work(tmp_path):
    callback, module = StabilityCallback("observe", log_every=1), Module()
    fit(tmp_path, module, callback, fast_dev_run=True)
    assert [each.step for each in readings(callback)] == [1]
    fit(tmp_path, module, callback)
    assert len(readings(callback)) == 8
    assert not callback.monitor.errors
    assert clean(module)


def test_gradient_norms_are_those_before_clipping_and_mixed_precision_changes_nothing(tmp_path):
    ends, found = [], []
    for options in ({"gradient_clip_val": 1e-3}, {"gradient_clip_val": None}):
        callback = StabilityCallback("observe", log_every=1, sinks=[])
        fit(tmp_path, Module(), callback, max_steps=1, **options)
        found.append(readings(callback)[0].gradients)
    assert found[0] == found[1]
    for callback in (None, StabilityCallback("observe", log_every=3, sinks=[])):
        module = Module(dropout=0.1)
        fit(tmp_path, module, callback, precision="bf16-mixed")
        ends.append(weights(module))
    assert same_bits(*ends)
    assert readings(callback)[0].info["model.transformer.h.0.attn"].dtype == "bfloat16"


class Long(Tokens):
    """Rows long enough for entropies to be judged."""

    def __init__(self, rows=256, length=48):
        self.tokens = torch.randint(
            3, 32, (rows, length), generator=torch.Generator().manual_seed(1)
        )


class Guarded(Module):
    """Multiplies W_q and W_k of the first layer after step 8; trained by SGD under a schedule, and
    notes the rates that it moved by.
    """

    def __init__(self):
        super().__init__()
        self.scheduled, self.moved = [], []

    def optimizer_step(self, epoch, batch_idx, optimizer, closure):
        bias = self.model.transformer.ln_f.bias
        before = bias.detach().clone()
        self.scheduled.append(optimizer.param_groups[0]["lr"])
        super().optimizer_step(epoch, batch_idx, optimizer, closure)
        self.moved.append(((before - bias).norm() / bias.grad.norm()).item())
        if (
            len(self.moved) == 8
            and self.trainer.current_epoch == 0
            and self.trainer.global_step < 9
        ):
            with torch.no_grad():
                self.model.transformer.h[0].attn.c_attn.weight[:, :64].mul_(60.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), 1e-3)
        schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 14)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "interval": "step"}}


def test_guard_clips_under_lightning_and_leaves_the_model_clean(tmp_path):
    callback, module = StabilityCallback("guard", log_every=1), Guarded()
    fit(tmp_path, module, callback, data=DataLoader(Long(), 4), max_steps=14)
    assert not callback.monitor.errors
    audit = lines(tmp_path / "stabmon" / "interventions.jsonl")
    assert ("qk_clip", "applied", 9) in [
        (each["intervention"], each["action"], each["step"]) for each in audit
    ]
    assert clean(module)


def test_a_lowered_rate_holds_under_lightning_and_through_a_checkpoint_and_resume(tmp_path):
    from lightning.pytorch.callbacks import ModelCheckpoint

    def run(folder, guarded, ckpt_path=None):
        options = (
            {
                "interventions": {"lower_learning_rate": {"factor": 0.25}},
                "budget": {"patience": 100},
            }
            if guarded
            else {}
        )
        callback, module = StabilityCallback("observe", log_every=1, sinks=[], **options), Guarded()
        keeps = ModelCheckpoint(folder, every_n_train_steps=11, save_top_k=-1, filename="{step}")
        more = {"max_steps": 14, "enable_checkpointing": True, "gradient_clip_val": None}
        fit(
            folder,
            module,
            callback,
            more=[keeps],
            ckpt_path=ckpt_path,
            data=DataLoader(Long(), 4),
            **more,
        )
        assert not callback.monitor.errors
        return callback.monitor.applied, module.scheduled, module.moved

    _, plain, _ = run(tmp_path / "plain", guarded=False)
    applied, scheduled, moved = run(tmp_path / "one", guarded=True)
    assert [(each.intervention.name, each.step) for each in applied] == [("lower_learning_rate", 9)]
    assert scheduled == plain, "the scheduler sees its own rates"
    used = [rate * (0.25 if step > 9 else 1.0) for step, rate in enumerate(plain, start=1)]
    assert moved == pytest.approx(used, rel=0.02, abs=1e-9)
    again, scheduled, moved = run(
        tmp_path / "one", guarded=True, ckpt_path=tmp_path / "one" / "step=11.ckpt"
    )
    assert [each.intervention.name for each in again] == ["lower_learning_rate"]
    assert scheduled == plain[11:]
    assert moved == pytest.approx(used[11:], rel=0.02, abs=1e-9)


def test_a_stop_ends_lightning(tmp_path):
    class Poisons(pl.Callback):
        def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
            if batch_idx == 3:
                with torch.no_grad():
                    pl_module.model.transformer.wte.weight[0, 0] = math.nan

    callback, module = (
        StabilityCallback("observe", log_every=1, sinks=[], interventions={"stop": {}}),
        Module(),
    )
    trainer = fit(tmp_path, module, callback, more=[Poisons()], max_steps=12)
    assert trainer.global_step < 8
    assert "non_finite" in callback.monitor.stop_reason


class Manual(Module):
    """Two optimizers with a schedule each, stepped by hand, every ``every``-th batch."""

    def __init__(self, every=1, slips=None):
        super().__init__()
        self.automatic_optimization, self.every, self.slips = False, every, slips

    def training_step(self, batch, index):
        optimizers = self.optimizers()
        self.manual_backward(self.model(**batch).loss)
        if (index + 1) % self.every:
            return
        if self.slips is not None and self.trainer.global_step >= 2 * self.slips:
            optimizers[1].param_groups[0]["lr"] = 0.5
        for optimizer, schedule in zip(optimizers, self.lr_schedulers(), strict=True):
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()

    def configure_optimizers(self):
        inner = [p for name, p in self.named_parameters() if p.ndim == 2 and ".h." in name]
        outer = [p for p in self.parameters() if all(p is not each for each in inner)]
        optimizers = [torch.optim.AdamW(outer, 1e-2), torch.optim.Muon(inner, lr=2e-2)]
        return optimizers, [
            torch.optim.lr_scheduler.ExponentialLR(each, 0.5) for each in optimizers
        ]


def test_of_several_optimizers_each_group_is_known_and_a_batch_is_one_step(tmp_path):
    watched, plain = Manual(), Manual()
    callback = StabilityCallback("observe", log_every=2, schedule="fixed", sinks=[])
    trainer = fit(tmp_path, watched, callback, max_steps=16)
    fit(tmp_path, plain, max_steps=16)
    assert same_bits(weights(watched), weights(plain))
    assert clean(watched)
    assert not any(
        each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks
        for each in trainer.optimizers
    )
    assert not callback.monitor.errors
    assert [reading.step for reading in readings(callback)] == [2, 4, 6, 8]
    rates = [
        {"0.0": 1e-2 * 0.5 ** (step - 1), "1.0": 2e-2 * 0.5 ** (step - 1)} for step in (2, 4, 6, 8)
    ]
    assert [reading.learning_rates for reading in readings(callback)] == [
        pytest.approx(each) for each in rates
    ]
    assert all(
        reading.updates["0.0"] > 0 and reading.updates["1.0"] > 0 for reading in readings(callback)
    )
    assert all(len(reading.query_key) == 2 for reading in readings(callback))


def test_a_step_by_hand_every_other_batch_is_one_step_of_two_micro_batches(tmp_path):
    callback = StabilityCallback("observe", log_every=1, sinks=[])
    fit(tmp_path, Manual(every=2), callback, max_steps=8)
    assert [(reading.step, reading.micro_batches) for reading in readings(callback)] == [
        (1, 2),
        (2, 2),
        (3, 2),
        (4, 2),
    ]


def test_a_resume_without_our_state_counts_batches_as_lightning_does(tmp_path):
    checkpoint = pl.callbacks.ModelCheckpoint(tmp_path, every_n_train_steps=8, save_top_k=-1)
    fit(tmp_path, Manual(), more=[checkpoint], max_steps=8, enable_checkpointing=True)
    callback = StabilityCallback("observe", log_every=1, sinks=[])
    fit(
        tmp_path,
        Manual(),
        callback,
        max_steps=12,
        ckpt_path=checkpoint.best_model_path or checkpoint.last_model_path,
    )
    assert [reading.step for reading in readings(callback)] == [5, 6]


def test_a_ceiling_holds_also_where_the_rate_is_set_in_the_training_step(tmp_path):
    class Slips(Module):
        def training_step(self, batch, index):
            self.optimizers().param_groups[0]["lr"] = 1e-2 if index < 4 else 1.0
            return super().training_step(batch, index)

    class Cap(pl.Callback):
        def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
            if batch_idx == 3:
                callback.monitor._guard.run.rates.cap({"0.0": 1e-2})

    def last(slips, *more):
        module = slips()
        fit(tmp_path, module, callback, more)
        return weights(module)

    callback = StabilityCallback("observe", log_every=1, sinks=[])
    held = last(Slips, Cap())
    assert [reading.learning_rates["0.0"] for reading in readings(callback)] == [1e-2] * 4 + [
        1.0
    ] * 4
    assert [reading.used_rates["0.0"] for reading in readings(callback)] == pytest.approx(
        [1e-2] * 8
    )
    callback = StabilityCallback("observe", log_every=1, sinks=[])
    right = last(Module)
    assert all(
        torch.allclose(one, other, atol=1e-5)
        for one, other in zip(held.values(), right.values(), strict=True)
    )


@pytest.mark.parametrize("mode", ["fast_dev_run", "barebones"])
def test_a_dry_mode_leaves_nothing_behind(tmp_path, mode, monkeypatch):
    monkeypatch.chdir(tmp_path)
    callback = StabilityCallback(
        "guard", log_every=1, run_dir=tmp_path / "runs", sinks=["jsonl", "tensorboard", "console"]
    )
    options = {
        "fast_dev_run": {"fast_dev_run": 2, "logger": True},
        "barebones": {"barebones": True, "max_steps": 2},
    }
    trainer = pl.Trainer(
        accelerator="cpu",
        devices=1,
        callbacks=[callback],
        enable_progress_bar=False,
        enable_model_summary=False,
        **options[mode],
    )
    trainer.fit(Module(), DataLoader(Tokens(8), 4))
    assert len(readings(callback)) == 2
    assert not callback.monitor.errors
    assert list(tmp_path.iterdir()) == []


def test_issues_of_several_fits_are_all_there(tmp_path):
    callback, module = StabilityCallback("observe", log_every=1, sinks=["jsonl"]), Module()
    with torch.no_grad():
        module.model.transformer.h[1].attn.c_attn.weight[0, 0] = math.nan
    fit(tmp_path, module, callback, max_steps=2)
    first = callback.issues
    assert "non_finite" in {each.issue_type for each in first}
    fit(tmp_path, module, callback, max_steps=2)
    assert len(callback.issues) > len(first)
    assert callback.issues[: len(first)] == first
    records = read_records(tmp_path)
    assert len(records.runs) == 2
    assert [each.key for each in records.issues] == [each.key for each in callback.issues]


def test_the_wandb_logger_keeps_the_rows_that_its_user_logs_at_steps_of_their_own(
    tmp_path, monkeypatch
):
    import wandb
    from lightning.pytorch.loggers import WandbLogger

    for name, value in {
        "MODE": "offline",
        "SILENT": "true",
        "CONSOLE": "off",
        "X_DISABLE_STATS": "true",
    }.items():
        monkeypatch.setenv(f"WANDB_{name}", value)

    class Logs(pl.Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, index):
            if trainer.global_step % 4 == 0:
                trainer.logger.experiment.log(
                    {"mine": trainer.global_step}, step=trainer.global_step // 4
                )

    found = []
    for callback in (None, StabilityCallback("observe", log_every=1)):
        logger = WandbLogger(save_dir=tmp_path, offline=True)
        fit(tmp_path, Module(), callback, more=[Logs()], logger=logger, log_every_n_steps=100)
        file = logger.experiment.settings.sync_file
        wandb.finish()
        found.append(wandb_rows(file))
    mine = [[(row["_step"], row["mine"]) for row in each if "mine" in row] for each in found]
    assert mine == [[(1, 4), (2, 8)]] * 2
    assert sorted(row["stabmon/step"] for row in found[1] if "stabmon/step" in row) == list(
        range(1, 9)
    )
    assert not callback.monitor.errors
