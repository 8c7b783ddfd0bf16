"""A lowered rate holds under every scheduler and across a resume, and nobody but the optimizer's
step ever sees it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import transformers
from torch import nn
from torch.optim import lr_scheduler as schedules

from stabmon.interventions import Intervention, NotApplicable, TrainingRun
from stabmon.interventions.extend_warmup import ExtendWarmup
from stabmon.interventions.lower_learning_rate import LowerLearningRate
from tests.support.intervention_runs import first_layer, loss_of, run_of, train_step
from tests.support.sweeps import sweep

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULES: dict[str, Make] = {
    "none": lambda o: None,
    "lambda": lambda o: schedules.LambdaLR(o, lambda step: 1 / (1 + step)),
    "cosine": lambda o: schedules.CosineAnnealingLR(o, 100),
    "warm restarts": lambda o: schedules.CosineAnnealingWarmRestarts(o, 13),
    "linear": lambda o: schedules.LinearLR(o, 1.0, 0.1, 100),
    "exponential": lambda o: schedules.ExponentialLR(o, 0.97),
    "one cycle": lambda o: schedules.OneCycleLR(o, 0.1, total_steps=120),
    "sequential": lambda o: schedules.SequentialLR(
        o, [schedules.LinearLR(o, 0.1), schedules.CosineAnnealingLR(o, 90)], [10]
    ),
    "plateau": lambda o: schedules.ReduceLROnPlateau(o, patience=5),
    "transformers cosine": lambda o: transformers.get_cosine_schedule_with_warmup(o, 10, 100),
    "transformers linear": lambda o: transformers.get_linear_schedule_with_warmup(o, 10, 100),
    "transformers inverse root": lambda o: transformers.get_inverse_sqrt_schedule(o, 10),
    "transformers wsd": lambda o: transformers.get_wsd_schedule(o, 10, 30, num_training_steps=100),
}


class Recorder(torch.optim.Optimizer):
    """Notes the rates that it is to step with."""

    def __init__(self, params: Any, lr: float) -> None:
        super().__init__(params, {"lr": lr, "momentum": 0.9})
        self.used: list[list[float]] = []

    def step(self, closure: Any = None) -> None:
        if closure is not None:
            closure()
        self.used.append([group["lr"] for group in self.param_groups])


def tiny(make: Make) -> tuple[TrainingRun, Any]:
    model = nn.Linear(2, 2)
    optimizer = Recorder([{"params": [model.weight]}, {"params": [model.bias], "lr": 0.3}], lr=0.1)
    run = TrainingRun(model, optimizer)
    return run, make(optimizer)


def go(
    run: TrainingRun, scheduler: Any, steps: int, start: int = 0
) -> tuple[list[list[float]], list[list[float]]]:
    """(rates used, rates seen between steps) with a loss that stops falling after a while."""
    run.optimizer.used = []
    seen = []
    for step in range(start, start + steps):
        for parameter in run.model.parameters():
            parameter.grad = torch.ones_like(parameter)
        run.optimizer.step()
        seen.append([group["lr"] for group in run.optimizer.param_groups])
        if isinstance(scheduler, schedules.ReduceLROnPlateau):
            scheduler.step(max(1.0, 10.0 - step))
        elif scheduler is not None:
            scheduler.step()
        run.step += 1
        run.step_hooks.fire("on_step")
    return run.optimizer.used, seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_rate_used_is_the_schedules_times_the_factor_for_a_hundred_steps_and_nobody_else_sees_it(
    name: str,
) -> None:
    plain, scheduler = tiny(SCHEDULES[name])
    scheduled, _ = go(plain, scheduler, 100)
    assert name == "none" or len({rates[0] for rates in scheduled}) > 1
    run, scheduler = tiny(SCHEDULES[name])
    LowerLearningRate(factor=0.25).apply(run)
    used, seen = go(run, scheduler, 100)
    assert used == [[rate * 0.25 for rate in rates] for rates in scheduled]
    assert seen == scheduled


@pytest.mark.parametrize("name", ["cosine", "plateau", "one cycle", "transformers linear"])
def test_it_holds_over_a_checkpoint_and_a_resume(name: str) -> None:
    plain, scheduler = tiny(SCHEDULES[name])
    scheduled, _ = go(plain, scheduler, 100)
    run, scheduler = tiny(SCHEDULES[name])
    applied = LowerLearningRate(factor=0.25).apply(run)
    go(run, scheduler, 50)
    saved = applied.state_dict(), run.optimizer.state_dict(), scheduler.state_dict()
    fresh, scheduler = tiny(SCHEDULES[name])
    fresh.optimizer.load_state_dict(saved[1])
    scheduler.load_state_dict(saved[2])
    LowerLearningRate(**saved[0]["settings"]).resume(fresh, saved[0])
    used, _ = go(fresh, scheduler, 50, start=50)
    assert used == [[rate * 0.25 for rate in rates] for rates in scheduled[50:]]


def test_factors_multiply_and_each_can_go_by_itself_in_any_order() -> None:
    run, _ = tiny(SCHEDULES["none"])
    half, quarter = (
        LowerLearningRate(factor=0.5).apply(run),
        LowerLearningRate(factor=0.25).apply(run),
    )
    assert go(run, None, 1)[0] == [[0.1 * 0.125, 0.3 * 0.125]]
    half.undo()
    half.undo()
    assert go(run, None, 1)[0] == [[0.1 * 0.25, 0.3 * 0.25]]
    quarter.undo()
    assert go(run, None, 1)[0] == [[0.1, 0.3]]
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


def test_a_step_that_raises_leaves_no_lowered_rate_behind_once_it_is_made_again() -> None:
    run, _ = tiny(SCHEDULES["none"])
    applied = LowerLearningRate(factor=0.5).apply(run)

    def closure() -> float:
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError):
        run.optimizer.step(closure)
    assert go(run, None, 2) == ([[0.05, 0.15]] * 2, [[0.1, 0.3]] * 2)
    with pytest.raises(RuntimeError):
        run.optimizer.step(closure)
    applied.undo()
    assert [group["lr"] for group in run.optimizer.param_groups] == [0.1, 0.3]


def test_a_tensor_rate_is_the_same_object_again() -> None:
    model = nn.Linear(2, 2)
    rate = torch.tensor(0.1)
    run = TrainingRun(model, torch.optim.Adam(model.parameters(), lr=rate))
    LowerLearningRate(factor=0.5).apply(run)
    model.weight.grad = torch.ones_like(model.weight)
    run.optimizer.step()
    assert run.optimizer.param_groups[0]["lr"] is rate
    assert rate.item() == pytest.approx(0.1)


def test_it_reaches_the_optimizer_inside_accelerates() -> None:
    import accelerate

    model = nn.Linear(2, 2)
    inner = Recorder(model.parameters(), lr=0.1)
    run = TrainingRun(model, accelerate.Accelerator(cpu=True).prepare_optimizer(inner))
    LowerLearningRate(factor=0.5).apply(run)
    model.weight.grad = torch.ones_like(model.weight)
    run.optimizer.step()
    assert inner.used == [[0.05]]


def test_without_a_torch_optimizer_it_refuses_and_says_what_to_do() -> None:
    with pytest.raises(NotApplicable, match="no optimizer") as error:
        LowerLearningRate().apply(TrainingRun(nn.Linear(2, 2)))
    assert "optimizer=" in error.value.advice


def test_extend_warmup_ramps_up_and_lets_go_also_after_a_resume() -> None:
    run, _ = tiny(SCHEDULES["none"])
    applied = ExtendWarmup(steps=4, start=0.2).apply(run)
    used, _ = go(run, None, 2)
    state = applied.state_dict()
    fresh, _ = tiny(SCHEDULES["none"])
    fresh.step = run.step
    ExtendWarmup(**state["settings"]).resume(fresh, state)
    used = used + go(fresh, None, 4)[0]
    assert [rates[0] for rates in used] == pytest.approx([0.02, 0.04, 0.06, 0.08, 0.1, 0.1])


@pytest.mark.parametrize(
    "optimizer", sweep([torch.optim.AdamW, torch.optim.SGD, torch.optim.Adagrad], keep=1)
)
@pytest.mark.parametrize(
    "name", ["llama-sdpa", "gpt2-sdpa", "gpt_neox-sdpa", "qwen3-sdpa", "multihead-fused"]
)
def test_for_queries_and_keys_alone_the_step_is_that_of_a_lower_rate_and_all_else_steps_as_ever(
    name: str, optimizer: type[torch.optim.Optimizer]
) -> None:
    def stepped(act: Intervention | None, rate: float) -> dict[str, torch.Tensor]:
        run = run_of(name, optimizer)
        for group in run.optimizer.param_groups:
            group["lr"] = rate
        if act is not None:
            act.apply(run)
        train_step(run)
        return {n: p.detach().clone() for n, p in run.model.named_parameters()}

    full, low = stepped(None, 1e-2), stepped(None, 1e-3)
    mixed = stepped(LowerLearningRate(factor=0.1, where="query_key"), 1e-2)
    changed = {n: (mixed[n] != full[n]).float().mean().item() for n in full}
    slowed = {n for n, share in changed.items() if share > 0.3}
    assert {
        n
        for n in full
        if any(part in n for part in ("q_proj", "k_proj", "_norm.weight")) and "self_attn" in n
    } <= slowed
    for n in full:
        if any(part in n for part in ("c_attn", "query_key_value", "in_proj")):
            assert 0.3 < changed[n] < 0.7, "the rows of values are to step as ever"
        rows = mixed[n] != full[n]
        torch.testing.assert_close(mixed[n][rows], low[n][rows], rtol=1e-4, atol=1e-7)
        if not any(part in n for part in ("attn", "attention")):
            assert torch.equal(mixed[n], full[n])


def test_for_queries_and_keys_alone_undo_leaves_no_hook() -> None:
    run = run_of("gpt2-sdpa")
    applied = LowerLearningRate(factor=0.1, where="query_key").apply(run)
    assert first_layer(run) in [layer for layer, _ in applied.effect.places]
    applied.undo()
    assert not run.optimizer._optimizer_step_pre_hooks
    assert not run.optimizer._optimizer_step_post_hooks


@pytest.mark.parametrize(
    "settings", [{"factor": 0.0}, {"factor": 1.5}, {"factor": True}, {"where": "values"}]
)
def test_settings_are_checked(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="lower_learning_rate"):
        LowerLearningRate(**settings)


def two() -> tuple[TrainingRun, list[Recorder]]:
    """A run with two optimizers, of which the first has two groups."""
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    first = Recorder(
        [{"params": [model[0].weight]}, {"params": [model[0].bias], "lr": 0.3}], lr=0.1
    )
    return TrainingRun(model, [first, second := Recorder(model[1].parameters(), lr=0.02)]), [
        first,
        second,
    ]


def used(optimizers: list[Recorder]) -> list[float]:
    """The rates that each group is stepped with now."""
    for each in optimizers:
        each.step()
    return [rate for each in optimizers for rate in each.used[-1]]


def test_ceilings_do_not_add_up_each_holds_its_own_group_and_rates_below_are_used_as_they_are() -> (
    None
):
    run, optimizers = two()
    release = run.rates.cap({"0.0": 0.01, "1.0": 0.5})
    assert used(optimizers) == pytest.approx([0.01, 0.3, 0.02])
    again = run.rates.cap({"0.0": 0.01})
    assert used(optimizers) == pytest.approx([0.01, 0.3, 0.02])
    assert run.rate_factors == {"0.0": pytest.approx(0.1)}
    assert run.rate_factor == pytest.approx(0.1)
    again()
    release()
    release()
    assert used(optimizers) == [0.1, 0.3, 0.02]
    assert (run.rate_factor, run.rate_factors) == (1.0, {})
    assert [group.rate for group in run.groups] == [0.1, 0.3, 0.02]
    assert not any(
        each._optimizer_step_pre_hooks or each._optimizer_step_post_hooks for each in optimizers
    )


def test_factors_of_groups_multiply_below_a_ceiling_and_a_warm_up_takes_its_whole_length_under_it() -> (
    None
):
    run, optimizers = two()
    run.rates.hold(lambda: 0.5)
    run.rates.hold_groups({"0.1": lambda: 0.5})
    run.rates.hold_groups(lambda group: 0.1 if group.key == "1.0" else None)
    assert used(optimizers) == pytest.approx([0.05, 0.075, 0.001])
    run.rates.cap(lambda group: 0.06)
    assert used(optimizers) == pytest.approx([0.05, 0.06, 0.001])
    run.rates.hold(lambda: 0.25, ramp=True)
    assert used(optimizers) == pytest.approx([0.0125, 0.015, 0.00025])


def test_a_ceiling_stays_with_its_parameters_where_groups_are_made_anew() -> None:
    run, optimizers = two()
    run.rates.cap({"0.1": 0.01})
    groups = optimizers[0].param_groups
    optimizers[0].param_groups = [{**groups[1]}, {**groups[0]}]
    assert used(optimizers) == pytest.approx([0.01, 0.1, 0.02])


def test_a_rate_that_is_set_in_the_middle_of_a_step_is_lowered_too() -> None:
    run, (first, _) = two()
    run.rates.cap({"0.0": 0.01})
    assert [run.scheduled_rate(group) for group in run.groups] == [0.1, 0.3, 0.02]

    def closure() -> None:
        first.param_groups[0]["lr"] = 5.0
        assert [run.scheduled_rate(group) for group in run.groups] == [5.0, 0.3, 0.02]
        run.step_hooks.fire("before_optimizer_step")
        assert [run.scheduled_rate(group) for group in run.groups] == [5.0, 0.3, 0.02]

    first.step(closure)
    assert first.used == [[pytest.approx(0.01), 0.3]]
    assert [group["lr"] for group in first.param_groups] == [5.0, 0.3]


def test_a_lower_rate_of_queries_and_keys_is_one_for_the_optimizer_that_steps_them_alone() -> None:
    def moved(factor: float | None) -> list[torch.Tensor]:
        run = run_of("llama-sdpa", optimizer=None)
        inner = [
            p for name, p in run.model.named_parameters() if "self_attn" in name and p.ndim == 2
        ]
        outer = [p for p in run.model.parameters() if all(p is not each for each in inner)]
        run.optimizer = [
            torch.optim.SGD(outer, 0.1),
            torch.optim.Muon(inner, lr=0.1, weight_decay=0.0),
        ]
        if factor is not None:
            LowerLearningRate(factor=factor, where="query_key").apply(run)
        before = [p.detach().clone() for p in inner[:4]]
        loss_of(run.model, run.inputs).backward()
        for each in run.optimizers:
            each.step()
        return [p.detach() - was for p, was in zip(inner[:4], before, strict=True)]

    full, lowered = moved(None), moved(0.25)
    for at, (whole, less) in enumerate(zip(full, lowered, strict=True)):
        torch.testing.assert_close(less, whole * (0.25 if at < 2 else 1.0), rtol=1e-3, atol=1e-6)


def test_queries_and_keys_of_an_optimizer_that_was_not_given_keep_their_rate_and_that_is_said() -> (
    None
):
    run = run_of("llama-sdpa", optimizer=None)
    run.optimizer = torch.optim.SGD(
        [p for name, p in run.model.named_parameters() if "self_attn" not in name], 0.1
    )
    with pytest.raises(NotApplicable, match="an optimizer that was not given") as error:
        LowerLearningRate(where="query_key").apply(run)
    assert "optimizer=[" in error.value.advice


@pytest.mark.parametrize("shared", [True, False])
def test_a_rate_held_as_a_tensor_is_changed_in_that_tensor_and_put_back(shared: bool) -> None:
    run, _ = tiny(SCHEDULES["none"])
    groups = run.optimizer.param_groups
    tensors = [torch.tensor(0.5), torch.tensor(0.25)]
    tensors = [tensors[0]] * 2 if shared else tensors
    for group, tensor in zip(groups, tensors, strict=True):
        group["lr"] = tensor
    scheduled, seen = [float(each) for each in tensors], []
    run.optimizer.register_step_pre_hook(lambda *_: None)
    LowerLearningRate(factor=0.5).apply(run)
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append([(group["lr"] is was, float(was)) for group, was in pairs])
    )
    pairs = list(zip(groups, tensors, strict=True))
    for _ in range(2):
        go(run, None, 1)
        assert [float(each) for each in tensors] == scheduled
        assert all(group["lr"] is was for group, was in pairs)
    assert seen == [[(True, rate / 2) for rate in scheduled]] * 2


def test_groups_that_share_a_tensor_and_have_factors_of_their_own_each_use_theirs() -> None:
    run, _ = tiny(SCHEDULES["none"])
    rate, seen = torch.tensor(0.5), []
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.rates.hold_groups({"0.0": lambda: 0.5, "0.1": lambda: 0.25})
    run.optimizer.register_step_pre_hook(
        lambda *_: seen.append([float(group["lr"]) for group in run.optimizer.param_groups])
    )
    go(run, None, 1)
    assert seen == [[0.25, 0.125]]
    assert all(group["lr"] is rate for group in run.optimizer.param_groups)
    assert rate == 0.5


def test_a_rate_that_the_closure_writes_into_its_tensor_is_lowered_as_well() -> None:
    run, _ = tiny(SCHEDULES["none"])
    rate, seen = torch.tensor(0.5), []
    for group in run.optimizer.param_groups:
        group["lr"] = rate
    run.rates.hold(lambda: 0.5)
    for parameter in run.model.parameters():
        parameter.grad = torch.ones_like(parameter)

    def closure() -> None:
        seen.append(float(rate))
        rate.fill_(0.75)
        run.rates._change_new_rates()
        seen.append(float(rate))

    run.optimizer.step(closure)
    assert seen == [0.25, 0.375]
    assert rate == 0.75
