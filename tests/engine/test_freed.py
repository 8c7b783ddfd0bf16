"""Closed monitors are freed as soon as nobody holds them, with the models that they watched."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import stabmon
from stabmon._torch.optimizer_adapter import innermost
from stabmon.interventions import INTERVENTIONS
from stabmon.interventions.run.snapshots import Snapshot
from stabmon.records import StabilityIssue
from tests.support.small_runs import PackedAttention, batches, gpt2, optimizer_of, train

FIRST = "transformer.h.0.attn"
pytestmark = pytest.mark.filterwarnings("ignore")

Refs = dict[str, weakref.ref[Any]]


@pytest.fixture
def _uncollected() -> Iterator[None]:
    """No garbage collection within the test."""
    gc.collect()
    gc.disable()
    yield
    gc.enable()


def refs_to(monitor: stabmon.AttentionStabilityMonitor) -> Refs:
    parts = {
        "monitor": monitor,
        "model": monitor.model,
        "history": monitor._tracker.history,
    }
    parts |= {f"optimizer {at}": each for at, each in enumerate(innermost(monitor.optimizer))}
    return {name: weakref.ref(each) for name, each in parts.items()}


def alive(refs: Refs) -> list[str]:
    return [name for name, ref in refs.items() if ref() is not None]


def watched(config: str, **options: Any) -> stabmon.AttentionStabilityMonitor:
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, config=config, log_every=1, sinks=[], **options
    )
    train(model, monitor, optimizer, batches(3))
    return monitor


@pytest.mark.usefixtures("_uncollected")
@pytest.mark.parametrize("config", ["observe", "guard"])
def test_a_closed_monitor_dies_with_the_last_reference(config: str) -> None:
    monitor = watched(config, on_issue=lambda issue: None)
    refs = refs_to(monitor)
    monitor.close()
    assert monitor.applied or config == "observe"
    assert monitor.state_dict()["guard"]["applied"] or config == "observe"
    del monitor
    assert alive(refs) == []


@pytest.mark.usefixtures("_uncollected")
def test_interventions_still_held_at_the_end_keep_nothing_alive() -> None:
    monitor = watched("guard")
    issue = StabilityIssue(3, FIRST, 0, "logit_growth", "error", 1.0, 0.5, "")
    held = set()
    for name, kind in sorted(INTERVENTIONS.items()):
        settings = {"qk_clip": {"target": 0.01}, "cap_learning_rate": {"cap": 1e-4}}.get(name, {})
        applied = monitor.apply(replace(kind(**settings), issues=(issue,)))
        held |= set() if applied is None or not applied.active else {name}
    once = monitor.apply(INTERVENTIONS["lower_learning_rate"](factor=0.5), hold=False)
    assert once is not None
    assert held >= {"qk_clip", "cap_learning_rate", "lower_learning_rate", "skip_step"}
    refs = refs_to(monitor)
    monitor.close()
    del monitor, once, applied
    assert alive(refs) == []


@pytest.mark.usefixtures("_uncollected")
def test_a_run_of_other_modules_and_a_forward_that_raised_keep_nothing_alive() -> None:
    model = PackedAttention()
    optimizer = torch.optim.SGD(model.parameters(), 1e-2)
    monitor = stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[])
    for width in (12, 13, 12):  # the second does not fit
        try:
            loss = model(torch.randn(2, 5, width)).square().mean()
        except RuntimeError:
            continue
        loss.backward()
        optimizer.step()
        monitor.on_step(loss)
    refs = refs_to(monitor)
    monitor.close()
    del monitor, model, optimizer, loss
    assert alive(refs) == []


def test_a_closed_monitor_that_is_kept_holds_no_copy_of_the_weights() -> None:
    monitor = watched("guard")
    assert any(isinstance(each, Snapshot) for each in gc.get_objects())
    monitor.close()
    assert monitor.applied
    gc.collect()
    assert not any(isinstance(each, Snapshot) for each in gc.get_objects())


def analyzed() -> Refs:
    model = gpt2().eval()
    analyzer = stabmon.AttentionAnalyzer(model)
    with torch.no_grad():
        model(input_ids=batches(1)[0])
    assert analyzer.diagnose().stats
    return {"analyzer": weakref.ref(analyzer), "model": weakref.ref(model)}


@pytest.mark.usefixtures("_uncollected")
def test_an_analyzer_dies_with_the_last_reference() -> None:
    assert alive(analyzed()) == []


def fitted_by_transformers(folder: Path) -> Refs:
    from stabmon.integrations.transformers import StabilityCallback
    from tests.integrations.test_transformers import trainer_of

    callback = StabilityCallback("guard", log_every=1)
    trainer = trainer_of(folder, callback, gpt2(), max_steps=2)
    trainer.train()
    assert callback.monitor is not None
    return refs_to(callback.monitor) | {"trainer": weakref.ref(trainer)}


def fitted_by_lightning(folder: Path) -> Refs:
    from stabmon.integrations.lightning import StabilityCallback
    from tests.integrations.test_lightning import Module, fit

    callback = StabilityCallback("guard", log_every=1)
    fit(folder, Module(), callback, max_steps=2)
    assert callback.monitor is not None
    return refs_to(callback.monitor)


@pytest.mark.parametrize("fitted", [fitted_by_transformers, fitted_by_lightning])
def test_a_callback_keeps_nothing_of_a_training_that_is_over(
    tmp_path: Path, fitted: Callable[[Path], Refs]
) -> None:
    refs = fitted(tmp_path)
    gc.collect()  # a trainer is a circle of its own
    assert alive(refs) == []
