"""The engine in a plain loop: it samples what it should, tells of what fails, and leaves training
as it was.
"""

import copy
import gc
import json
import logging
import pickle
import time
import weakref
from dataclasses import dataclass

import pytest
import torch
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import stabmon
from stabmon.rules import RULES
from stabmon.signals.base import SIGNALS, Signal
from stabmon.sinks import Sink
from tests.support.small_runs import (
    HEADS,
    Floats,
    HalfSeen,
    batches,
    clean,
    gpt2,
    lines,
    optimizer_of,
    same_bits,
    same_readings,
    train,
    weights,
)
from tests.support.sweeps import sweep


def watch(model, optimizer=None, **options):
    return stabmon.AttentionStabilityMonitor(
        model, optimizer, config="observe", **({"sinks": [], "log_every": 2} | options)
    )


def run(model, data, monitored=True, log_every=2, schedule="adaptive", **loop):
    """Train from a seed; gives (diagnoses, monitor closed)."""
    torch.manual_seed(5)
    optimizer = optimizer_of(model)
    options = {"log_every": log_every, "schedule": schedule}
    monitor = watch(model, optimizer, **options) if monitored else None
    given = train(model, monitor, optimizer, data, **loop)
    if monitor:
        monitor.close()
    return given, monitor


# -- what is sampled


def test_a_diagnosis_comes_at_multiples_of_log_every_and_at_no_other_step():
    given, monitor = run(gpt2(), batches(7), log_every=3, schedule="fixed")
    assert [each and each.step for each in given] == [None, None, 3, None, None, 6, None]
    assert list(given[2].stats) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert all(
        values.shape == (HEADS,)
        for signals in given[2].stats.values()
        for values in signals.values()
    )
    assert set(given[2].stats["transformer.h.0.attn"]) >= {
        "attention_entropy",
        "max_logit",
        "hnf_log_curvature",
    }
    assert not monitor.errors


def test_a_run_folder_holds_readings_issues_and_what_was_watched(tmp_path):
    model = gpt2()
    optimizer = optimizer_of(model)
    options = {"schedule": "fixed", "sinks": ["jsonl"], "run_dir": tmp_path}
    with watch(model, optimizer, **options) as monitor:
        train(model, monitor, optimizer, batches(4))
        monitor.close()
        monitor.close()
    readings = lines(tmp_path / "stabmon" / "readings.jsonl")
    assert [reading["step"] for reading in readings] == [2, 4]
    assert [step for step, _ in readings[1]["losses"]] == [3, 4]
    meta = json.loads((tmp_path / "stabmon" / "meta.json").read_text())
    assert meta["config"]["log_every"] == 2
    assert meta["sampling"] == {
        "schedule": "fixed",
        "every": 2,
        "unit": "optimizer step",
        "first": 2,
        "max_overhead": None,
    }
    assert meta["model"]["parameters"] == sum(parameter.numel() for parameter in model.parameters())
    assert (tmp_path / "stabmon" / "issues.jsonl").exists()


def test_a_closed_monitor_stays_silent_and_the_model_is_clean():
    model = gpt2()
    optimizer = optimizer_of(model)
    with watch(model, optimizer, log_every=1) as monitor:
        assert train(model, monitor, optimizer, batches(1))[0] is not None
        assert not clean(model)
    assert clean(model)
    assert not optimizer._optimizer_step_pre_hooks
    assert train(model, monitor, optimizer, batches(1)) == [None]


def test_forwards_of_evaluation_and_generation_are_not_counted():
    def look(model):
        def evaluate(_):
            model.eval()
            with torch.no_grad():
                model(input_ids=batches(1, seed=9)[0])
                model.generate(batches(1, seed=9)[0][:, :3], max_new_tokens=3, do_sample=False)
            model(input_ids=batches(1, seed=8)[0])  # evaluation by one who forgets no_grad
            model.train()
            with torch.no_grad():
                model(input_ids=batches(1, seed=7)[0])

        return evaluate

    plain, _ = run(gpt2(), batches(4))
    model = gpt2()
    between, monitor = run(model, batches(4), between=look(model))
    assert all(same_readings(plain[i].stats, between[i].stats) for i in (1, 3))
    assert between[1].readings[-1].micro_batches == 1
    assert not monitor.errors


def test_accumulated_micro_batches_make_one_reading_which_is_that_of_the_whole_batch():
    (whole,) = batches(1, rows=8)
    (one,), _ = run(gpt2(), [whole], log_every=1)
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=1)
    for part in whole.split(2):
        (model(input_ids=part, labels=part).loss / 4).backward()
    optimizer.step()
    two = monitor.on_step()
    monitor.close()
    assert same_readings(one.stats, two.stats, 1e-6)
    assert two.readings[-1].micro_batches == 4
    assert two.readings[-1].gradients[""] == pytest.approx(one.readings[-1].gradients[""], rel=1e-4)
    assert two.readings[-1].loss == pytest.approx(one.readings[-1].loss, rel=1e-5)


@pytest.mark.parametrize("reentrant", [True, False])
def test_the_second_forward_of_activation_checkpoints_is_not_counted(reentrant):
    plain, _ = run(gpt2(dropout=0.1), batches(3), log_every=1)
    model = gpt2(dropout=0.1)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    checkpointed, monitor = run(model, batches(3), log_every=1)
    assert list(checkpointed[0].stats) == ["transformer.h.0.attn", "transformer.h.1.attn"]
    assert same_readings(plain[2].stats, checkpointed[2].stats, 1e-5)
    assert not monitor.errors
    unwatched = gpt2(dropout=0.1)
    unwatched.gradient_checkpointing_enable({"use_reentrant": reentrant})
    run(unwatched, batches(3), monitored=False)
    assert same_bits(weights(model), weights(unwatched))


class Halves(nn.Module):
    """Two parts, of which one is checkpointed as a whole where told."""

    def __init__(self, reentrant=None):
        super().__init__()
        self.first, self.second, self.reentrant = Floats(), nn.Linear(4, 4), reentrant

    def forward(self, x):
        inner = (
            self.first(x)
            if self.reentrant is None
            else checkpoint(self.first, x, use_reentrant=self.reentrant)
        )
        return self.second(inner)


@pytest.mark.parametrize("reentrant", [None, True, False])
@pytest.mark.parametrize("place", ["hook on the loss", "hook on a leaf"])
def test_forwards_made_inside_backward_are_seen_and_their_checkpoints_are_not_counted_twice(
    place, reentrant
):
    """GradCache: embeddings without gradients, then a forward with gradients in each part, in a
    hook of the loss's backward.
    """
    x = torch.randn(8, 6, 32, generator=torch.Generator().manual_seed(0))
    given = []
    for cached in (False, True):
        torch.manual_seed(0)
        model = Halves(reentrant)
        with watch(model, None, log_every=1) as monitor:
            parts = x.requires_grad_().split(4)
            if cached:
                with torch.no_grad():
                    leaf = torch.cat([model(part) for part in parts])
                leaf.requires_grad_()
            else:
                leaf = torch.cat([model(part) for part in parts])
            loss = (leaf @ leaf.T).logsumexp(1).mean()
            (gradient,) = torch.autograd.grad(loss, leaf, retain_graph=True)

            def again(_, model=model, parts=parts, gradient=gradient):
                with torch.enable_grad():
                    for part, own in zip(parts, gradient.split(4), strict=True):
                        (model(part) * own).sum().backward()

            if cached:
                (
                    loss.register_hook
                    if place == "hook on the loss"
                    else leaf.register_post_accumulate_grad_hook
                )(again)
            loss.backward()
            given.append(monitor.on_step(loss))
            assert not monitor.errors
    plain, cached = (each.readings[-1] for each in given)
    assert same_readings(plain.layers, cached.layers, 1e-5)
    assert cached.micro_batches == plain.micro_batches == 2
    assert cached.gradients == {
        name: pytest.approx(norm, rel=1e-4) for name, norm in plain.gradients.items()
    }


def test_gradient_norms_are_those_before_clipping():
    clipped, _ = run(gpt2(), batches(1), log_every=1, clip=0.01)
    free, _ = run(gpt2(), batches(1), log_every=1, clip=None)
    assert clipped[0].readings[-1].gradients == free[0].readings[-1].gradients
    model = gpt2()
    model(input_ids=batches(1)[0], labels=batches(1)[0]).loss.backward()
    expected = torch.cat([p.grad.flatten() for p in model.parameters()]).norm().item()
    attention = (
        torch.cat([p.grad.flatten() for p in model.transformer.h[1].attn.parameters()])
        .norm()
        .item()
    )
    assert free[0].readings[-1].gradients[""] == pytest.approx(expected, rel=1e-5)
    assert free[0].readings[-1].gradients["transformer.h.1.attn"] == pytest.approx(
        attention, rel=1e-5
    )


@pytest.mark.parametrize(("scale", "overflows"), [(1024.0, False), (1e38, True)])
def test_a_gradient_scaler_is_taken_out_of_gradient_norms_and_its_overflows_are_not_reported(
    scale, overflows
):
    free, _ = run(gpt2(), batches(1), log_every=1, clip=None)
    model = gpt2()
    optimizer, scaler = optimizer_of(model), torch.amp.GradScaler("cpu", init_scale=scale)
    monitor = watch(model, optimizer, log_every=1, grad_scaler=scaler)
    loss = model(input_ids=batches(1)[0], labels=batches(1)[0]).loss * 50
    scaler.scale(loss / 50).backward()
    model.lm_head.weight.grad *= 1e4 if overflows else 1
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    (reading,) = monitor.on_step(loss / 50).readings
    monitor.close()
    expected = {} if overflows else free[0].readings[-1].gradients
    assert reading.gradients == {
        name: pytest.approx(norm, rel=1e-4) for name, norm in expected.items()
    }
    assert monitor.issues == []
    assert not monitor.errors


def test_two_models_in_one_process_do_not_mix():
    student, teacher = gpt2(), gpt2(n_head=2)
    optimizer = optimizer_of(student)
    both = [watch(student, optimizer, log_every=1), watch(teacher, None, log_every=1)]
    tokens = batches(1)[0]
    wanted = teacher(input_ids=tokens).logits
    loss = nn.functional.mse_loss(student(input_ids=tokens).logits, wanted)
    loss.backward()
    optimizer.step()
    of_student, of_teacher = (each.on_step() for each in both)
    for each in both:
        each.close()
    assert of_student.stats["transformer.h.0.attn"]["max_logit"].shape == (4,)
    assert of_teacher.stats["transformer.h.0.attn"]["max_logit"].shape == (2,)
    alone, _ = run(gpt2(), [tokens], log_every=1)
    assert same_readings(of_student.stats, alone[0].stats)
    assert clean(student)
    assert clean(teacher)


def test_the_loss_of_a_loop_that_tells_none_is_that_in_the_models_output():
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=1)
    loss = model(input_ids=batches(1)[0], labels=batches(1)[0]).loss
    loss.backward()
    optimizer.step()
    assert monitor.on_step().readings[-1].loss == loss.item()
    monitor.close()


def test_a_loss_that_is_no_number_costs_the_loss_and_not_the_reading(caplog):
    model = gpt2()
    monitor = watch(model, log_every=1)
    model(input_ids=batches(1)[0])
    diagnosis = monitor.on_step(torch.ones(3))
    monitor.close()
    assert diagnosis.stats
    assert diagnosis.readings[-1].loss is None
    assert "give on_step a single number" in caplog.text


# -- resuming


@pytest.mark.parametrize("rows", [None, 4])
def test_a_resumed_monitor_goes_on_as_if_nothing_had_been(rows):
    def go(model, optimizer, monitor, data):
        return train(model, monitor, optimizer, data)

    model = gpt2()
    optimizer = optimizer_of(model, 0.3)
    whole = watch(model, optimizer, log_every=3, sample_rows=rows)
    expected = go(model, optimizer, whole, batches(12))

    model = gpt2()
    optimizer = optimizer_of(model, 0.3)
    first = watch(model, optimizer, log_every=3, sample_rows=rows)
    go(model, optimizer, first, batches(12)[:7])
    state = json.loads(json.dumps(first.state_dict()))
    first.close()
    second = watch(model, optimizer, log_every=3, sample_rows=rows)
    second.load_state_dict(state)
    resumed = go(model, optimizer, second, batches(12)[7:])
    assert [each and each.step for each in resumed] == [each and each.step for each in expected[7:]]
    assert same_readings(resumed[-1].stats, expected[-1].stats)
    assert resumed[1].readings[-1].losses == expected[8].readings[-1].losses
    assert [r.step for r in resumed[-1].readings] == [r.step for r in expected[-1].readings]
    assert repr(second.issues) == repr(whole.issues)
    assert repr(second.open_issues) == repr(whole.open_issues)
    ends = [each.state_dict() for each in (second, whole)]
    for end in ends:
        end["schedule"]["budget"] |= {"elapsed": None, "spent": None}
        for reading in end["tracker"]["history"]["readings"]:
            reading["overhead_fraction"] = None
    assert json.dumps(ends[0]) == json.dumps(ends[1])
    second.close()
    whole.close()


def test_a_state_that_is_none_is_refused_and_says_why():
    monitor = watch(gpt2())
    with pytest.raises(ValueError, match=r"give what state_dict\(\) returned"):
        monitor.load_state_dict({"step": 3})
    assert monitor.step == 0
    monitor.close()


# -- what fails


class Broken(Sink):
    def write_reading(self, reading, scalars):
        raise OSError("disk full")


def test_a_failing_sink_is_logged_once_and_counted(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=1, sinks=[Broken()])
    given = train(model, monitor, optimizer, batches(2))
    monitor.close()
    assert all(each.stats for each in given)
    assert monitor.errors == {"sink": 1}
    assert caplog.text.count("disk full") == 1


def test_a_run_folder_that_cannot_be_made_does_not_stop_training(tmp_path, caplog):
    (tmp_path / "stabmon").write_text("in the way")
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=1, sinks=["jsonl"], run_dir=tmp_path)
    given = train(model, monitor, optimizer, batches(2))
    monitor.close()
    assert all(each.stats for each in given)
    assert monitor.errors["make_folder"] == 1
    assert "training goes on" in caplog.text


@dataclass(frozen=True)
class AlwaysFails:
    def check(self, history):
        raise ZeroDivisionError("rule at fault")


def test_a_failing_rule_is_logged_once_and_the_others_go_on(caplog):
    with RULES.temporarily("always_fails", AlwaysFails):
        given, monitor = run(gpt2(), batches(4), log_every=1)
    assert all(each.stats for each in given)
    assert monitor.errors == {"rule": 1}
    assert caplog.text.count("rule at fault, which") + caplog.text.count("rule failed") == 1


def test_a_failing_signal_is_told_of_once_and_the_others_are_measured(caplog):
    def fails(operator):
        raise ZeroDivisionError("signal at fault")

    model = gpt2()
    optimizer = optimizer_of(model)
    with SIGNALS.temporarily("fails", Signal("fails", fails, "none", "mean", ())):
        monitor = watch(
            model, optimizer, log_every=1, signals=["max_logit", "fails", "attention_entropy"]
        )
        given = train(model, monitor, optimizer, batches(3))
        monitor.close()
    assert set(given[2].stats["transformer.h.0.attn"]) == {"max_logit", "attention_entropy"}
    assert monitor.errors == {"signal": 1}
    assert caplog.text.count("signal failed") == 1


def test_where_nothing_can_be_measured_training_goes_on_and_it_is_logged_once(caplog, monkeypatch):
    def no(*_, **__):
        raise MemoryError("nothing left")

    monkeypatch.setattr("stabmon.signals.accumulator.operator_of", no)
    model, twin = gpt2(dropout=0.1), gpt2(dropout=0.1)
    _, monitor = run(model, batches(3), log_every=1)
    monkeypatch.undo()
    run(twin, batches(3), monitored=False)
    assert same_bits(weights(model), weights(twin))
    assert monitor.errors["capture"] == 6
    assert caplog.text.count("capture failed") == 1
    assert "no attention was found" not in caplog.text


def test_a_model_without_attention_is_one_clear_error(caplog):
    model = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 1))
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=2, schedule="fixed")
    for _ in range(6):
        model(torch.randn(3, 4)).sum().backward()
        optimizer.step()
        monitor.on_step()
    monitor.close()
    assert monitor.errors == {"sampling": 3}
    assert len(caplog.records) == 1
    message = caplog.records[0].getMessage()
    assert "step 2" in message
    assert "no attention was found in Sequential" in message
    assert "scaled_dot_product_attention" in message
    assert "attention_modules" in message


def test_a_model_that_is_never_called_is_one_clear_error(caplog):
    monitor = watch(gpt2(), log_every=1)
    monitor.on_step(1.0)
    monitor.close()
    assert "no training forward of the model was seen" in caplog.text


def test_a_forward_that_raises_leaves_nothing_behind_and_the_next_step_is_sampled(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=1)
    with pytest.raises(IndexError):
        model(input_ids=torch.full((1, 4), 99), labels=torch.ones(1, 4, dtype=torch.long))
    assert clean(model)
    monitor.on_step()  # a loop that skips the batch and counts the step
    given = train(model, monitor, optimizer, batches(2))
    monitor.close()
    assert all(each.stats for each in given)
    assert not monitor.errors
    assert optimizer._optimizer_step_pre_hooks == {}


def test_after_a_keyboard_interrupt_in_mid_forward_close_leaves_nothing_and_going_on_works():
    model = gpt2()
    optimizer = optimizer_of(model)

    def interrupt(*_):
        raise KeyboardInterrupt

    for goes_on in (False, True):
        monitor = watch(model, optimizer, log_every=1)
        handle = model.transformer.h[1].mlp.register_forward_pre_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(model, monitor, optimizer, batches(1))
        handle.remove()
        if goes_on:
            model.eval()
            with torch.no_grad():
                model(input_ids=batches(1)[0])
            model.train()
            assert all(each.stats for each in train(model, monitor, optimizer, batches(2)))
            assert not monitor.errors
        monitor.close()
        assert clean(model)


def test_bad_arguments_are_refused_at_once():
    with pytest.raises(TypeError, match=r"give the torch\.nn\.Module"):
        stabmon.AttentionStabilityMonitor("gpt2")
    with pytest.raises(ValueError, match="log_every"):
        watch(gpt2(), log_every=0)
    with pytest.raises(ValueError, match="did you mean 'log_every'"):
        watch(gpt2(), log_evry=3)


# -- what it costs and keeps


def test_no_batch_and_no_graph_outlives_its_step():
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=2)
    for _ in range(4):
        batch = torch.randn(4, 6, 32)
        encoded = (batch * nn.Parameter(torch.ones(32))).tanh()
        out = model(encoded)
        loss = out.square().mean()
        loss.backward()
        optimizer.step()
        monitor.on_step(loss)
        alive = [weakref.ref(each) for each in (batch, encoded, out, loss)]
        del batch, encoded, out, loss
        assert [each() for each in alive] == [None] * 4  # at once, without the collector of cycles
    monitor.close()


def test_history_and_pending_losses_are_bounded():
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=1, history=4)
    given = train(model, monitor, optimizer, batches(9))
    assert [reading.step for reading in given[-1].readings] == [6, 7, 8, 9]
    monitor.close()
    monitor = watch(gpt2(), log_every=10**6, schedule="fixed", history=4)
    for _ in range(500):
        monitor.on_step(1.0)
    assert len(monitor.state_dict()["losses"]) == 80
    monitor.close()


def test_a_copy_and_a_pickle_of_a_watched_model_take_no_watch_along():
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=1, sinks=[Broken()])
    twin, stored = copy.deepcopy(model), pickle.dumps(model)
    assert b"stabmon" not in stored
    assert clean(twin)
    assert clean(pickle.loads(stored))
    twin(input_ids=batches(1)[0], labels=batches(1)[0])
    assert monitor.on_step() is not None
    assert "no training forward" not in str(monitor.errors)
    train(model, monitor, optimizer, batches(1))
    monitor.close()
    tokens = batches(1)[0]
    assert torch.equal(pickle.loads(stored)(input_ids=tokens).logits, twin(input_ids=tokens).logits)


@pytest.mark.parametrize("log_every", [1, 50])
def test_a_monitor_does_not_outlive_its_model(log_every):
    model = gpt2()
    monitor = watch(model, optimizer_of(model), log_every=log_every)
    gone = weakref.ref(monitor)
    del model, monitor
    gc.collect()
    assert gone() is None


def test_the_bench_of_twins_notices_a_single_draw_and_a_single_hook_left(monkeypatch):
    from stabmon.engine.step_observer import StepObserver
    from stabmon.signals.accumulator import Measurements
    from tests.bench.bitwise_neutrality import Case, pair

    case, measured = Case("plain", log_every=5, steps=10), Measurements.add
    assert pair(case)[0] == []
    monkeypatch.setattr(
        Measurements, "add", lambda self, call: (torch.rand(1), measured(self, call))[1]
    )
    assert "torch generator" in pair(case)[0]
    monkeypatch.undo()
    monkeypatch.setattr(StepObserver, "close", lambda self: None)
    assert any(each.startswith("left behind: ") for each in pair(case)[0])


# -- compiled models


@pytest.fixture
def fresh_dynamo():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def train_compiled(how, monitored, schedule="fixed"):
    """Nine steps; gives (what on_step gave, monitor, model, graphs compiled)."""
    torch._dynamo.reset()
    counters.clear()
    model = Floats()
    optimizer = optimizer_of(model)
    options = {"log_every": 3, "schedule": schedule}
    monitor = watch(model, optimizer, **options) if monitored and how == "compiled later" else None
    if how == "in place":
        model.compile(backend="aot_eager")
    called = model if how == "in place" else torch.compile(model, backend="aot_eager")
    if monitored and monitor is None:
        monitor = watch(called if how == "wrapper watched" else model, optimizer, **options)
    given = []
    torch.manual_seed(3)
    for _ in range(9):
        loss = called(torch.randn(2, 6, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step(loss) if monitor else None)
    if monitor:
        monitor.close()
    return given, monitor, model, counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    "how", sweep(["wrapper watched", "compiled later", "inner watched", "in place"], keep=2)
)
def test_compiled_models_are_measured_without_compiling_anew_and_without_a_changed_bit(
    how, fresh_dynamo
):
    _, _, twin, graphs = train_compiled(how, monitored=False)
    given, monitor, model, graphs_watched = train_compiled(how, monitored=True)
    assert [bool(each and each.stats) for each in given] == [False, False, True] * 3
    assert list(given[2].stats) == ["first", "second"]
    assert not monitor.errors
    assert graphs_watched == graphs
    assert same_bits(weights(model), weights(twin))
    assert clean(model)


def test_a_model_compiled_after_it_is_watched_is_measured_from_the_second_step(fresh_dynamo):
    given, monitor, *_ = train_compiled("compiled later", monitored=True, schedule="adaptive")
    assert [bool(each and each.stats) for each in given] == [False] + 8 * [True]
    assert not monitor.errors


def test_a_compiled_step_function_is_a_clear_error_and_not_silence(caplog, fresh_dynamo):
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, log_every=2, schedule="fixed")
    step = torch.compile(lambda x: model(x).square().mean(), backend="aot_eager")
    for _ in range(4):
        step(torch.randn(2, 6, 32)).backward()
        optimizer.step()
        monitor.on_step()
    monitor.close()
    assert monitor.errors == {"sampling": 2}
    errors = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert len(errors) == 1
    assert "compiled function" in errors[0].getMessage()


def test_time_spent_inside_is_reported_as_a_share():
    def slow(*_):
        time.sleep(0.02)

    model = gpt2()
    optimizer = optimizer_of(model)
    model.register_forward_hook(slow)
    monitor = watch(model, optimizer, log_every=5)
    share = train(model, monitor, optimizer, batches(10))[-1].readings[-1].overhead_fraction
    monitor.close()
    assert 0.0 < share < 0.6


def test_gradients_that_are_made_between_the_steps_of_two_optimizers_are_looked_at():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.one, self.other = Floats(), Floats()

        def forward(self, part, x):
            return getattr(self, part)(x).square().mean()

    model = Pair()
    optimizers = {
        part: torch.optim.SGD(getattr(model, part).parameters(), 0.1) for part in ("one", "other")
    }
    with stabmon.AttentionStabilityMonitor(
        model, optimizers, config="guard", log_every=1, sinks=[]
    ) as monitor:
        found = []
        for step in range(3):
            for part, optimizer in optimizers.items():
                optimizer.zero_grad()
                loss = model(
                    part, torch.randn(2, 6, 32, generator=torch.Generator().manual_seed(step))
                )
                (loss * (float("nan") if (step, part) == (1, "other") else 1.0)).backward()
                optimizer.step()
            found.append(monitor.on_step().stats)
            assert all(p.isfinite().all() for p in model.parameters())
        readings = monitor._tracker.history.readings
        assert [None if each.non_finite is None else each.non_finite.step for each in readings] == [
            None,
            2,
            None,
        ]
        assert all(
            set(each.updates) == {"0.0", "1.0"} and min(each.updates.values()) >= 0
            for each in readings
        )
        assert readings[1].updates["1.0"] == 0
        assert readings[0].updates["1.0"] > 0
        assert len(readings[0].query_key) == 4
        assert not monitor.errors


# -- what is not seen


def test_attention_that_is_not_seen_is_said_once_kept_in_the_metadata_and_costs_no_bit(
    tmp_path, caplog
):
    losses = {}
    for watched in (False, True):
        torch.manual_seed(0)
        model = HalfSeen()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
        options = {"log_every": 1, "sinks": ["jsonl"], "run_dir": tmp_path}
        monitor = watch(model, optimizer, **options) if watched else None
        losses[watched] = []
        for _ in range(4):
            loss = model(torch.randn(2, 5, 12)).pow(2).mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses[watched].append(loss.item())
            diagnosis = monitor.on_step(loss) if watched else None
    monitor.close()
    assert losses[True] == losses[False]
    assert monitor.unseen == dict(diagnosis.unseen) == {"second": "a softmax of a product"}
    assert (
        json.loads((tmp_path / "stabmon" / "meta.json").read_text())["unseen_attention"]
        == monitor.unseen
    )
    assert caplog.text.count("not seen: second (a softmax of a product)") == 1
    assert not monitor.errors
