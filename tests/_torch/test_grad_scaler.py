"""A gradient scaler is known wherever there is one, its search is no alarm, and one that skips for
ever is.
"""

import gc
import math
import weakref

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import nn

import stabmon
from stabmon._torch.grad_scaler import ScalerWatch
from stabmon._torch.optimizer_adapter import innermost
from tests.support.small_runs import Floats, optimizer_of, same_bits, weights


def scaler_of(**options):
    return torch.amp.GradScaler("cpu", **options)


def root_at_zero(out, bad):
    """A loss that is finite and has no finite gradient where it is bad."""
    away = (out - out.detach()).square().sum().sqrt()
    return out.square().mean() + (away if bad else 0)


def go(
    bad,
    *,
    steps=40,
    given=False,
    optimizer=optimizer_of,
    scaler=None,
    watched=True,
    seen=True,
    **options,
):
    """Train under a scaler; ``bad`` says of a step whether its gradients are, ``seen`` whether the
    monitor is given the optimizer. Gives the monitor, the weights and the scaler."""
    torch.manual_seed(3)
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 4))
    scaler = scaler or scaler_of()
    inner = optimizer(model)
    settings = {"sinks": [], "log_every": 50} | options
    more = {"grad_scaler": scaler} if given else {}
    monitor = (
        stabmon.AttentionStabilityMonitor(model, inner if seen else None, **settings, **more)
        if watched
        else None
    )
    for step in range(1, steps + 1):
        loss = root_at_zero(model(torch.randn(2, 8)), bad(step))
        scaler.scale(loss).backward()
        scaler.step(inner)
        scaler.update()
        inner.zero_grad()
        if monitor:
            monitor.on_step(loss=loss.detach())
    if monitor:
        monitor.close()
        assert set(monitor.errors) <= {"sampling"}  # it has no attention
        assert not inner._optimizer_step_pre_hooks
    return monitor, weights(model), scaler


def told(monitor):
    return [
        (each.step, each.severity) for each in monitor.issues if each.issue_type == "non_finite"
    ]


def fused(model):
    return torch.optim.AdamW(model.parameters(), 1e-2, fused=True)


@pytest.mark.parametrize("given", [True, False])
@pytest.mark.parametrize("optimizer", [optimizer_of, fused])
@pytest.mark.parametrize("start", [1, 4])
def test_a_scaler_that_skips_for_ever_is_an_alarm_after_as_many_steps_as_its_search_takes(
    given, optimizer, start
):
    monitor, _, _ = go(lambda step: step >= start, given=given, optimizer=optimizer)
    assert told(monitor) == [(start + 16, "error"), (start + 33, "critical")]
    first, second = monitor.issues
    assert first.evidence["cause"] == "objective"
    assert first.evidence["touched"] == "gradients"
    assert (first.evidence["skipped"], first.evidence["scale"]) == (17, 2.0**16 / 2**17)
    assert (second.evidence["skipped"], second.evidence["scale"]) == (34, 2.0**16 / 2**34)
    assert (
        "17 steps in a row were skipped by the gradient scaler, whose scale is down to 0.5"
        in first.suggestion
    )


def test_without_an_optimizer_a_scale_that_falls_tells_of_skipped_steps():
    monitor, _, _ = go(lambda step: step >= 4, given=True, seen=False)
    assert told(monitor) == [(20, "error"), (37, "critical")]


def test_a_scaler_that_begins_higher_may_search_longer():
    monitor, _, _ = go(lambda step: True, scaler=scaler_of(init_scale=2.0**24))
    assert told(monitor) == [(25, "error")]
    monitor, _, _ = go(lambda step: True, scaler=scaler_of(backoff_factor=0.25), steps=15)
    assert told(monitor) == [(11, "error")]


@pytest.mark.parametrize("log_every", [1, 10])
def test_a_search_for_a_scale_and_single_overflows_are_no_issue(log_every):
    scaler = scaler_of(
        init_scale=2.0**127, growth_interval=4
    )  # overflows at first, and at each growth beyond
    monitor, ends, _ = go(lambda step: step in (7, 20, 21), scaler=scaler, log_every=log_every)
    assert told(monitor) == []
    _, unwatched, _ = go(
        lambda step: step in (7, 20, 21),
        scaler=scaler_of(init_scale=2.0**127, growth_interval=4),
        watched=False,
    )
    assert same_bits(ends, unwatched)


def test_a_loop_that_only_accumulates_leaves_steps_out_and_is_no_alarm():
    model, scaler = nn.Linear(8, 4), scaler_of()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, sinks=[], log_every=100, grad_scaler=scaler
    )
    for step in range(1, 61):
        loss = model(torch.randn(2, 8)).square().mean()
        scaler.scale(loss).backward()
        if step % 30 == 0:
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        monitor.on_step(loss=loss.detach())
    monitor.close()
    assert told(monitor) == []


def test_a_bad_forward_that_the_scaler_skips_is_traced_and_spoils_nothing():
    model, scaler = Floats(), scaler_of()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, config="guard", sinks=[], log_every=4, schedule="fixed"
    )
    for step in range(1, 8):
        x = torch.randn(2, 6, 32)
        x[1, 2, 3] = math.nan if step == 5 else 0.0
        loss = model(x).square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        monitor.on_step(loss=loss.detach())
    monitor.close()
    (issue,) = [each for each in monitor.issues if each.issue_type == "non_finite"]
    assert (issue.step, issue.severity, issue.evidence["tensor"]) == (5, "warning", "argument 0")
    assert (issue.evidence["cause"], issue.evidence["touched"]) == ("data", "gradients")
    assert [each.intervention.name for each in monitor.applied] == ["skip_step"]


def test_the_scaler_of_accelerate_s_wrapper_is_known_before_the_first_step():
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = scaler_of()
    inner = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    wrapper = accelerator.prepare_optimizer(inner)
    AcceleratorState._reset_state(reset_partial_state=True)
    watch = ScalerWatch(wrapper, innermost(wrapper))
    assert watch.scaler is accelerator.scaler
    assert watch.optimizers == [inner]


def test_the_scaler_of_another_model_is_not_taken_for_this_one_s():
    other, others_scaler = nn.Linear(2, 2), scaler_of()
    others_optimizer = torch.optim.SGD(other.parameters(), 0.1)
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = ScalerWatch(optimizer, innermost(optimizer))
    watch.watch()
    for step in range(4):
        others_scaler.scale(other(torch.ones(1, 2)).sum()).backward()
        others_scaler.step(others_optimizer)
        others_scaler.update()
        if step % 2:
            optimizer.step()
        assert watch.end_step() == (step % 2 == 0)
    watch.close()
    assert watch.scaler is None


def test_a_scaler_that_was_found_is_not_kept_alive():
    model, scaler = nn.Linear(2, 2), scaler_of()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    watch = ScalerWatch(optimizer, innermost(optimizer))
    watch.watch()
    scaler.scale(model(torch.ones(1, 2)).sum()).backward()
    scaler.step(optimizer)
    assert watch.scaler is scaler
    gone = weakref.ref(scaler)
    del scaler
    gc.collect()
    assert gone() is None
    assert watch.scaler is None


@pytest.mark.parametrize("scaler", [None, scaler_of(enabled=False)])
@pytest.mark.parametrize("given", [True, False])
def test_a_step_without_a_scaler_at_work_names_none(scaler, given):
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, sinks=[], log_every=10, grad_scaler=scaler if given else None
    )
    loss = root_at_zero(model(torch.randn(2, 6, 32)), True)
    (loss if scaler is None else scaler.scale(loss)).backward()
    optimizer.step() if scaler is None else scaler.step(optimizer)
    (issue,) = monitor.on_step().issues
    monitor.close()
    assert not monitor.errors
    assert issue.severity == "critical"
    assert "scale" not in f"{issue.suggestion} {dict(issue.evidence)}"
