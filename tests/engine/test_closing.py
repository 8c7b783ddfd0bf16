"""A fault anywhere while a monitor closes: nothing of stabmon is left behind, and nothing raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import stabmon
from tests.support.rank_faults import Planted, Tiny, at_entries, left_behind
from tests.support.sweeps import sweep

PARTS = 12


def guarded() -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    """Return a monitor under which a clip and a cap on the rate are held, its model and optimizer."""
    model = Tiny()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, config="guard", sinks=[], log_every=1
    )
    generator = torch.Generator().manual_seed(0)
    for step in range(1, 8):
        if step == 6:
            optimizer.param_groups[0]["lr"] = 1.0
        if step == 4:
            with torch.no_grad():
                model.attention.q.weight.mul_(60.0)
                model.attention.k.weight.mul_(60.0)
        output = model(torch.randn(4, 6, 32, generator=generator))
        loss = nn.functional.cross_entropy(output, torch.arange(4) % 4)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        monitor.on_step(loss)
    return monitor, model, optimizer


def close_with(act: Callable[[str], None], only: str | None = None) -> tuple[Any, list[str]]:
    """Close such a monitor, and return it and what is left behind."""
    monitor, model, optimizer = guarded()
    with at_entries(act, only):
        monitor.close()
    return monitor, left_behind(model, optimizer)


@pytest.fixture(scope="module")
def places() -> list[str]:
    """Return every function of stabmon that runs while such a monitor closes, in order."""
    found: dict[str, None] = {}
    monitor, left = close_with(lambda place: found.setdefault(place))
    assert left == [] == list(monitor.errors)
    assert {"qk_clip", "cap_learning_rate"} <= {each.intervention.name for each in monitor.applied}
    return list(found)


@pytest.mark.parametrize("part", sweep(range(PARTS), keep=1))
def test_a_fault_at_any_function_of_closing_leaves_nothing_behind(
    places: list[str], part: int
) -> None:
    """Plant it at each twelfth function, beginning at ``part``."""
    chosen = places[part::PARTS]
    assert len(chosen) > 2
    for place in chosen:
        fired: list[str] = []

        def act(place: str, fired: list[str] = fired) -> None:
            if not fired:
                fired.append(place)
                raise Planted(place)

        monitor, left = close_with(act, only=place)
        assert fired == [place]
        assert left == [], place
        assert sum(monitor.errors.values()) <= 1, (place, monitor.errors)
