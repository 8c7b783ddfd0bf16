"""A signal that fails is left out and tried again after 1, 2, 4, 8 … samples."""

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from stabmon.records import AttentionCall
from stabmon.signals import SIGNALS
from stabmon.signals.accumulator import Measurements


@pytest.fixture
def failing() -> Iterator[dict[str, bool]]:
    """A switch that lets the signal ``sink_mass`` raise."""
    switch, signal = {"on": True}, SIGNALS["sink_mass"]
    real = signal.function

    def function(operator: Any) -> Any:
        if switch["on"]:
            raise RuntimeError("planted")
        return real(operator)

    object.__setattr__(signal, "function", function)
    yield switch
    object.__setattr__(signal, "function", real)


def sample(measured: Measurements, step: int) -> bool:
    """Measure a step of two layers, and an unsampled step; return whether the signal is there."""
    query = torch.randn(1, 2, 6, 4)
    measured.start(step)
    for layer in "ab":
        measured.add(AttentionCall(layer, query, query, 0.5))
    found = {"sink_mass" in measured.sums[layer] for layer in "ab"}
    assert all("max_logit" in measured.sums[layer] for layer in "ab"), "others go on"
    measured.start(0)
    measured.start(0)
    return found == {True}


def test_it_is_tried_again_after_growing_intervals(failing: dict[str, bool]) -> None:
    errors: list[Exception] = []
    measured = Measurements(["max_logit", "sink_mass"], on_error=errors.append)
    tried = []
    for step in range(1, 40):
        if "sink_mass" in measured._signals:
            tried.append(step)
        assert not sample(measured, step)
    assert tried == [1, 3, 6, 11, 20, 37]
    assert len(errors) == 1
    assert "tried again" in errors[0].__notes__[0]


def test_it_is_back_once_it_works(failing: dict[str, bool]) -> None:
    measured = Measurements(["max_logit", "sink_mass"], on_error=lambda error: None)
    found = []
    for step in range(1, 12):
        failing["on"] = step < 3
        found.append(sample(measured, step))
    assert found == [False, False, *[True] * 9]
    failing["on"] = True
    assert not sample(measured, 12)
    failing["on"] = False
    assert [sample(measured, step) for step in (13, 14)] == [False, True]
