"""A step whose gradients are not finite changes nothing, and is counted."""

import pytest
import torch
from torch import nn

from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.skip_step import SkipStep
from tests.support.intervention_runs import all_bits, differences, run_of, train_step


def spoil(run: TrainingRun, value: float) -> None:
    """One value of one gradient, right before the optimizer looks."""
    list(run.model.parameters())[3].grad.view(-1)[1] = value


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("optimizer", [torch.optim.AdamW, torch.optim.SGD])
def test_a_bad_step_leaves_weights_moments_and_decay_alone(
    value: float, optimizer: type[torch.optim.Optimizer]
) -> None:
    run = run_of("gpt2-sdpa", optimizer, steps=2)
    run.optimizer.zero_grad()
    run.step_hooks.add("before_optimizer_step", lambda: spoil(run, value))
    applied = SkipStep().apply(run)
    before = all_bits(run)
    train_step(run)
    assert differences(before, all_bits(run)) == []
    assert applied.state_dict()["effect"] == {"skipped": 1, "in_a_row": 1}
    assert [record["action"] for record in run.records] == ["applied", "skipped"]
    assert run.records[1]["step"] == run.step == 3


def test_without_it_the_same_step_spoils_the_weights() -> None:
    run = run_of("gpt2-sdpa")
    run.step_hooks.add("before_optimizer_step", lambda: spoil(run, float("nan")))
    train_step(run)
    assert not all(p.isfinite().all() for p in run.model.parameters())


def test_good_steps_are_bit_for_bit_those_without_it() -> None:
    plain, run = run_of("gpt2-sdpa"), run_of("gpt2-sdpa")
    SkipStep().apply(run)
    for each in (plain, run):
        for _ in range(3):
            train_step(each)
    assert differences(all_bits(plain), all_bits(run)) == []


def test_it_says_once_that_skipping_does_not_help_and_starts_to_count_anew_after_a_good_step() -> (
    None
):
    run = run_of("gpt2-sdpa")
    bad = [True] * 5 + [False] + [True]
    run.step_hooks.add(
        "before_optimizer_step", lambda: spoil(run, float("nan")) if bad.pop(0) else None
    )
    applied = SkipStep(most=3).apply(run)
    for _ in range(7):
        train_step(run)
    notes = [record["note"] for record in run.records if record["action"] == "skipped"]
    assert [bool(note) for note in notes] == [False, True, False]
    assert "does not help" in notes[1]
    assert applied.state_dict()["effect"] == {"skipped": 6, "in_a_row": 1}


def test_with_a_gradient_scaler_it_refuses() -> None:
    model = nn.Linear(1, 1)
    run = TrainingRun(
        model, torch.optim.SGD(model.parameters(), lr=0.1), grad_scaler=torch.amp.GradScaler("cpu")
    )
    with pytest.raises(NotApplicable, match="scaler"):
        SkipStep().apply(run)


def test_sparse_gradients_are_looked_into() -> None:
    model = nn.Embedding(10, 2, sparse=True)
    run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
    SkipStep().apply(run)
    (model(torch.tensor([1, 1])) * float("nan")).sum().backward()
    run.step_hooks.fire("before_optimizer_step")
    assert model.weight.grad is None


def test_the_gradients_of_a_second_optimizer_that_come_after_the_firsts_step_are_looked_at_too() -> (
    None
):
    model = nn.ModuleList([nn.Linear(2, 1), nn.Linear(2, 1)])
    optimizers = [torch.optim.AdamW(each.parameters(), 0.1) for each in model]
    records: list[dict[str, object]] = []
    run = TrainingRun(model, optimizers, audit=lambda record: records.append(dict(record)))
    applied = SkipStep(most=3).apply(run)
    before = [p.detach().clone() for p in model[1].parameters()]
    for _ in range(3):
        for value, part, optimizer in zip((1.0, float("nan")), model, optimizers, strict=True):
            (part(torch.full((1, 2), value)).sum()).backward()
            run.step_hooks.fire("before_optimizer_step")
            optimizer.step()
            optimizer.zero_grad()
        run.step += 1
        run.step_hooks.fire("on_step")
    assert all(torch.equal(p, was) for p, was in zip(model[1].parameters(), before, strict=True))
    assert applied.state_dict()["effect"] == {"skipped": 3, "in_a_row": 3}
    assert [record["action"] for record in records] == ["applied", "skipped", "skipped"]
