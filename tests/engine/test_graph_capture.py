"""While a CUDA graph is captured no hook does anything, and its replays raise no alarm.

There is no CUDA here: that a stream is captured is the one thing that is pretended.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import nn

import stabmon
from stabmon._torch.grad_scaler import ScalerWatch
from stabmon._torch.graph_capture import is_capturing
from stabmon.interventions.run.learning_rates import LearningRates
from tests.support.small_runs import Floats


@contextmanager
def captured(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """As inside ``torch.cuda.graph``."""
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_initialized", lambda: True)
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        assert is_capturing()
        yield
    assert not is_capturing()


def loss_of(model: nn.Module) -> torch.Tensor:
    return model(torch.ones(2, 12, 32)).square().mean()


def test_a_step_that_is_captured_is_not_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    model = Floats()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        looked_at: list[int] = []
        inspect = monitor._parts.detector.before_optimizer_step
        monkeypatch.setattr(
            monitor._parts.detector,
            "before_optimizer_step",
            lambda ctx: (looked_at.append(ctx.step), inspect(ctx)),
        )
        for step in range(1, 5):
            optimizer.zero_grad()
            if step == 3:
                with captured(monkeypatch):
                    loss = loss_of(model)
                    loss.backward()
                    optimizer.step()
            else:
                loss = loss_of(model)
                loss.backward()
                optimizer.step()
            diagnosis = monitor.on_step(loss=loss)
            assert diagnosis is not None
            assert bool(diagnosis.stats) == (step != 3)
            reading = diagnosis.readings[-1]
            assert bool(reading.gradients) == (step != 3)
        assert looked_at == [1, 2, 4]


def test_replays_of_a_step_are_not_taken_for_steps_that_were_left_out(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = Floats()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=5, sinks=[]) as monitor:
        for step in range(1, 41):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            if step < 4:
                optimizer.step()
            elif step == 4:
                with captured(monkeypatch):
                    optimizer.step()
            monitor.on_step(loss=loss)
        assert not monitor.errors
        assert [each for each in monitor.issues if each.is_alarm] == []


def test_only_a_step_that_was_captured_makes_the_next_ones_unknown(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), 0.1)
    watch = ScalerWatch(optimizer, [optimizer])
    watch.watch()
    optimizer.step()
    assert watch.end_step() is False
    assert watch.end_step() is True
    with captured(monkeypatch):
        optimizer.step()
    assert watch.end_step() is False
    assert watch.end_step() is False


def test_rates_are_left_alone_while_a_step_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), torch.tensor(0.5))
    rates, seen = LearningRates([optimizer]), []
    rates.hold(lambda: 0.5)
    optimizer.register_step_pre_hook(lambda *_: seen.append(float(optimizer.param_groups[0]["lr"])))
    with captured(monkeypatch):
        optimizer.step()
    optimizer.step()
    assert seen == [0.5, 0.25]
