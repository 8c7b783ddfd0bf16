"""A fault in one listener stops no other, and a closed monitor stays closed."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import stabmon
from stabmon.engine.clock import Phase, StepClock
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.engine.gradients import GradientNorms
from stabmon.interventions.run.healthy_states import HealthyStates
from stabmon.listeners import StepContext, StepListener


class Recording(StepListener):
    """Note the moments it is called at, and raise at those in ``fails``."""

    def __init__(self, moments: list[str], fails: tuple[str, ...] = ()) -> None:
        self.moments, self.fails = moments, fails

    def _note(self, moment: str) -> None:
        self.moments.append(moment)
        if moment in self.fails:
            raise RuntimeError(moment)

    def on_step_begin(self, ctx: StepContext) -> None:
        self._note("begin")

    def on_backward_end(self) -> None:
        self._note("backward")

    def before_optimizer_step(self, ctx: StepContext) -> None:
        self._note("before")

    def on_step_end(self, ctx: StepContext) -> None:
        self._note("end")

    def close(self) -> None:
        self._note("close")


def test_a_listener_that_raises_at_every_moment_stops_no_other() -> None:
    first: list[str] = []
    second: list[str] = []
    moments = ["begin", "before", "end", "close"]
    boundary = ErrorBoundary()
    clock = StepClock(boundary, [Recording(first, tuple(moments)), Recording(second)])
    clock.phase = Phase.TRAINING
    ctx = StepContext(1, True)
    clock.on_step_begin(ctx)
    clock.before_optimizer_step(ctx)
    clock.on_step_end(ctx)
    assert clock.phase is Phase.TRAINING, "own work is left though a listener raised"
    clock.close()
    assert second == moments
    assert first == [*moments, "close"], "what raised as it was closed is closed again"
    assert boundary.errors["Recording.on_step_end"] == 1


def layer() -> nn.Module:
    torch.manual_seed(0)
    return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)


def train(model: nn.Module, monitor: Any, optimizer: Any, steps: int = 1) -> None:
    for _ in range(steps):
        if monitor._manual:
            monitor.begin_step()
        loss = model(torch.randn(2, 4, 8)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        if monitor._manual:
            monitor.before_optimizer_step()
        optimizer.step()
        monitor.on_step(loss)


def watched(**settings: Any) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    model = layer()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    settings = {"log_every": 1, "sinks": [], **settings}
    return model, optimizer, stabmon.AttentionStabilityMonitor(model, optimizer, **settings)


def test_a_monitor_that_is_closed_in_the_middle_of_own_work_stays_closed() -> None:
    model, optimizer, monitor = watched()
    monitor._guard.run.step_hooks.add("on_step", monitor.close)
    train(model, monitor, optimizer, steps=2)
    assert monitor.step == 1, "the second step came after the close"
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()]
    assert not any(hooks)


def test_apply_after_close_puts_no_hook_into_the_model() -> None:
    from stabmon.interventions.qk_clip import QkClip

    model, optimizer, monitor = watched()
    train(model, monitor, optimizer)
    monitor.close()
    assert monitor.apply(QkClip(target=1e9)) is None
    hooks = [len(each._forward_hooks) + len(each._forward_pre_hooks) for each in model.modules()]
    assert not any(hooks)


def test_gradient_norms_that_fail_keep_no_moment_from_any_listener(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def fails(*args: Any) -> Any:
        raise RuntimeError("planted")

    model, optimizer, monitor = watched()
    moments: list[str] = []
    monitor._clock.listeners.append(Recording(moments))
    monkeypatch.setattr(GradientNorms, "by_layer", fails)
    monkeypatch.setattr(GradientNorms, "measure", fails)
    train(model, monitor, optimizer, steps=2)
    assert moments[:3] == ["backward", "before", "end"]
    assert moments.count("before") == moments.count("backward") == 2
    assert {"measure_gradients", "gradient_norm"} <= set(monitor.errors)


def test_interventions_that_are_all_switched_off_stay_off_when_a_person_asks() -> None:
    model, optimizer, monitor = watched(interventions={"qk_clip": False})
    train(model, monitor, optimizer)
    diagnosis = stabmon.Diagnosis(1, (), {})
    assert monitor.get_intervention(diagnosis) is None
    assert dict(monitor._guard.policy.interventions) == {}
    assert not monitor.errors


@pytest.mark.parametrize("manual", [True, False])
def test_a_resumed_run_finds_the_healthy_state_on_disk(tmp_path: Path, manual: bool) -> None:
    settings = {
        "interventions": {"rollback": {"memory_gb": 0.0, "every": 1, "confirm": 0}},
        "run_dir": tmp_path,
        "manual_steps": manual,
    }
    model, optimizer, monitor = watched(**settings)
    train(model, monitor, optimizer, steps=6)
    kept = monitor._guard.run.find_prepared(HealthyStates).newest
    state = monitor.state_dict()
    assert state["guard"]["states"]["healthy"]
    monitor.close()
    _, _, resumed = watched(**settings)
    resumed.load_state_dict(state)
    found = resumed._guard.run.find_prepared(HealthyStates).newest
    assert found is not None
    assert found.step == kept.step
    assert all(found.tensors[name].equal(each) for name, each in kept.tensors.items())
