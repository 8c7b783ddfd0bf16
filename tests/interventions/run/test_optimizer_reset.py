"""An optimizer that begins anew knows nothing of before, warms up, and is undone to every bit."""

import pytest
import torch

from stabmon.interventions.qk_clip import QkClip
from stabmon.interventions.run.optimizer_reset import OptimizerReset
from tests.support.intervention_runs import (
    all_bits,
    differences,
    first_layer,
    growth,
    loss_of,
    run_of,
    scores_of,
    train_step,
)


@pytest.mark.parametrize(
    "optimizer",
    [
        torch.optim.AdamW,
        torch.optim.SGD,
        torch.optim.RMSprop,
        torch.optim.NAdam,
        torch.optim.Adafactor,
    ],
)
def test_with_heads_that_begin_anew_the_optimizer_does_and_undone_to_every_bit(
    optimizer: type[torch.optim.Optimizer],
) -> None:
    run = run_of("llama-sdpa", optimizer, steps=3)
    layer = first_layer(run)
    before, scores = all_bits(run), scores_of(run)[layer]
    applied = QkClip(fresh=scores[1] / 100).apply(run, growth(layer, from_the_start=True))
    moments = [
        each
        for entries in run.optimizer.state.values()
        for each in entries.values()
        if each is not None
    ]
    assert all(float(torch.as_tensor(each).abs().max()) in (0.0, 1.0) for each in moments)
    assert applied.undo() is True
    assert differences(before, all_bits(run)) == []
    run.step = 4
    applied = QkClip(fresh=scores[1] / 100).apply(run, growth(layer, from_the_start=True))
    rates = []
    for _ in range(2):
        rates.append(run.rate_factor)
        train_step(run)
    applied.release()
    assert rates == [0.25, 0.5], "a warm-up of as many steps as were made"
    assert run.rate_factor == 1.0
    resumed = QkClip(fresh=scores[1] / 100).resume(run, applied.state_dict())
    assert run.rate_factor == 0.75
    for _ in range(2):
        train_step(run)
    assert run.rate_factor == 1.0
    resumed.release()
    assert [
        float(entries["step"]) for entries in run.optimizer.state.values() if "step" in entries
    ] == [4.0] * sum("step" in entries for entries in run.optimizer.state.values())


@pytest.mark.parametrize(
    ("beta", "made", "steps"), [(0.95, 400, 40), (0.95, 7, 7), (0.999, 5000, 2000), (1.0, 9, 9)]
)
def test_the_warm_up_of_an_optimizer_that_begins_anew_is_what_its_averages_need(
    beta: float, made: int, steps: int
) -> None:
    run = run_of("gpt2-sdpa")
    for group in run.optimizer.param_groups:
        group["betas"] = (0.9, beta)
    run.step = made
    anew = OptimizerReset(run)
    assert anew.steps == steps
    assert run.rate_factor == pytest.approx(1 / steps)
    run.step += steps
    anew.moved_on()
    assert run.rate_factor == 1.0


def test_every_optimizer_of_the_run_begins_anew_and_the_warm_up_takes_its_whole_length_below_a_ceiling() -> (
    None
):
    run = run_of("llama-sdpa", optimizer=None)
    inner = [p for name, p in run.model.named_parameters() if "self_attn" in name and p.ndim == 2]
    outer = [p for p in run.model.parameters() if all(p is not each for each in inner)]
    run.optimizer = [
        torch.optim.AdamW(outer, lr=1.0, betas=(0.9, 0.5)),
        torch.optim.Muon(inner, lr=0.2),
    ]
    loss_of(run.model, run.inputs).backward()
    for each in run.optimizers:
        each.step()
    run.step = 9
    before = [(state, dict(state)) for each in run.optimizers for state in each.state.values()]
    run.rates.cap({"0.0": 0.1})
    anew = OptimizerReset(run)
    assert all(
        float(torch.as_tensor(value).abs().max()) == 0
        for state, _ in before
        for value in state.values()
    )
    assert {id(group.optimizer) for group in run.groups} == {id(each) for each in run.optimizers}
    assert anew.steps == 4
    used: list[list[float]] = []
    run.optimizer[0].register_step_pre_hook(
        lambda *_: used.append([group.rate for group in run.groups[:1]])
    )
    for _ in range(5):
        run.optimizer[0].step()
        run.step += 1
    assert [rate for (rate,) in used] == pytest.approx([0.025, 0.05, 0.075, 0.1, 0.1])
    anew.undo()
    assert all(state[name] is value for state, saved in before for name, value in saved.items())
