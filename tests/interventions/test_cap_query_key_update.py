"""A step changes no more of queries and keys than is allowed, whatever made it larger, and nothing
else is touched.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from stabmon.interventions import NotApplicable, TrainingRun
from stabmon.interventions.cap_query_key_update import CapQueryKeyUpdate
from stabmon.projections.locate import find_query_key
from tests.support.intervention_runs import first_layer, growth, run_of, train_step


def query_key(run: TrainingRun) -> list[Tensor]:
    rows = find_query_key(run.module(first_layer(run)), run.history.info.get(first_layer(run)))[
        0
    ].all_rows()
    return [each.view(each.parameter).detach() for each in rows]


def norm(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([each.flatten() for each in tensors])))


def step(run: TrainingRun, times: float = 1.0) -> tuple[float, dict[str, Tensor]]:
    """One step, of which the first layer's queries and keys make ``times`` as much: the share that
    is left of it, and all parameters.
    """
    before = [each.clone() for each in query_key(run)]

    def grow() -> None:
        with torch.no_grad():
            for was, now in zip(before, query_key(run), strict=True):
                now.copy_(was + times * (now - was))

    remove = run.step_hooks.add("on_step", grow, first=True)
    torch.manual_seed(0)
    train_step(run)
    remove()
    change = norm([now - was for was, now in zip(before, query_key(run), strict=True)])
    return change / norm(before), {
        name: p.detach().clone() for name, p in run.model.named_parameters()
    }


@pytest.mark.parametrize("times", [1.0, 50.0])
@pytest.mark.parametrize(
    "model", ["gpt2-sdpa", "llama-sdpa", "bert-sdpa", "gemma3-sdpa", "transformer_encoder"]
)
def test_a_step_is_scaled_to_the_cap_and_nothing_else_is_touched(model: str, times: float) -> None:
    free, held = run_of(model, steps=2), run_of(model, steps=2)
    usual, _ = step(free)
    step(held)
    applied = CapQueryKeyUpdate(share=0.5 * usual).apply(held, growth(first_layer(held)))
    wild, plain = step(free, times)
    share, capped = step(held, times)
    assert share == pytest.approx(min(0.5 * usual, wild), rel=1e-3)
    assert applied.effect.was_active()
    assert not applied.effect.was_active(), "since it was last asked"
    rows = find_query_key(held.module(first_layer(held)), held.history.info.get(first_layer(held)))[
        0
    ].all_rows()
    own = {id(each.parameter) for each in rows}
    others = [name for name, parameter in held.model.named_parameters() if id(parameter) not in own]
    assert others
    assert [name for name in others if not torch.equal(plain[name], capped[name])] == []


def test_a_step_below_the_cap_is_left_as_it_is() -> None:
    free, held = run_of("llama-sdpa", steps=2), run_of("llama-sdpa", steps=2)
    applied = CapQueryKeyUpdate(share=10.0).apply(held, growth(first_layer(held)))
    (_, plain), (_, capped) = step(free), step(held)
    assert [name for name in plain if not torch.equal(plain[name], capped[name])] == []
    assert not applied.effect.was_active()


def test_a_step_that_is_not_finite_is_left_to_others() -> None:
    run = run_of("llama-sdpa", steps=2)
    CapQueryKeyUpdate(share=1e-4).apply(run, growth(first_layer(run)))
    share, _ = step(run, float("inf"))
    assert not share < float("inf")


def test_its_own_past_is_what_the_issue_says_it_was() -> None:
    run = run_of("llama-sdpa", steps=2)
    issue = replace(
        growth(first_layer(run)),
        issue_type="update_spike",
        head=None,
        evidence={"usual_query_key_update": 0.01},
    )
    applied = CapQueryKeyUpdate(times=3.0).apply(run, issue)
    assert applied.record["after"] == {"share": {first_layer(run): pytest.approx(0.03)}}


def test_it_is_held_again_after_a_restart() -> None:
    first = run_of("gpt2-sdpa", steps=2)
    state = CapQueryKeyUpdate(share=1e-5).apply(first, growth(first_layer(first))).state_dict()
    run = run_of("gpt2-sdpa", steps=2)
    CapQueryKeyUpdate(share=1e-5).resume(run, state)
    assert step(run)[0] == pytest.approx(1e-5, rel=1e-2)


def test_without_a_past_it_does_not_fit() -> None:
    run = run_of("gpt2-sdpa", steps=2)
    with pytest.raises(NotApplicable, match="give a share"):
        CapQueryKeyUpdate().apply(run, growth(first_layer(run)))


@pytest.mark.parametrize("bad", [{"times": 0}, {"share": -1.0}, {"times": "much"}])
def test_settings_are_checked(bad: dict[str, float]) -> None:
    with pytest.raises(ValueError, match=next(iter(bad))):
        CapQueryKeyUpdate(**bad)


def test_it_follows_the_schedule_from_where_the_past_was_read() -> None:
    run = run_of("gpt2-sdpa", steps=2)
    layer, usual = first_layer(run), {group.key: 1e-2 for group in run.groups}
    run.history.readings[-1:] = [replace(run.history.latest, learning_rates=usual)] * 2
    issue = replace(
        growth(layer),
        issue_type="update_spike",
        head=None,
        evidence={"usual_query_key_update": 1e-4},
    )
    applied = CapQueryKeyUpdate(times=2.0).apply(run, issue)
    assert step(run)[0] == pytest.approx(2e-4, rel=1e-2)
    for group in run.optimizer.param_groups:
        group["lr"] = 2e-3
    assert step(run)[0] == pytest.approx(4e-5, rel=1e-2)
    again = CapQueryKeyUpdate().resume(run, applied.state_dict())
    applied.release()
    assert step(run)[0] == pytest.approx(4e-5, rel=1e-2)
    again.release()


def test_the_jump_of_one_group_does_not_lift_it() -> None:
    run = run_of("gpt2-sdpa", steps=2)
    optimizer, layer = run.optimizer, first_layer(run)
    parameters = optimizer.param_groups[0]["params"]
    own = {id(each.parameter) for each in find_query_key(run.module(layer), None)[0].all_rows()}
    optimizer.param_groups[0]["params"] = [each for each in parameters if id(each) not in own]
    optimizer.add_param_group({"params": [each for each in parameters if id(each) in own]})
    usual = {group.key: group.rate for group in run.groups}
    run.history.readings[-1:] = [replace(run.history.latest, learning_rates=usual)] * 2
    issue = replace(
        growth(layer),
        issue_type="update_spike",
        head=None,
        evidence={"usual_query_key_update": 1e-4},
    )
    CapQueryKeyUpdate(times=2.0).apply(run, issue)
    optimizer.param_groups[1]["lr"] *= 30.0
    assert step(run)[0] == pytest.approx(2e-4, rel=1e-2)
