"""Plant a fault at functions of stabmon on one of two ranks: training goes on as without it.

The functions are found by tracing an unfaulted run; a sample of them is taken here, and
``python tests/bench/injection.py`` takes all.
"""

from __future__ import annotations

import math
import random
from typing import Any

import pytest
import torch.distributed as dist

from tests.support.rank_faults import Outcome, run, same_weights
from tests.support.two_ranks import given_by, on_ranks

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")
SAMPLE, SEED = 2, 20
"""Functions tried in each of observe and guard beside :data:`ALWAYS`."""
ALWAYS = {
    "observe": (
        "engine/rank_reducer:RankReducer.reduce",
        "engine/step_contexts:StepContexts.at_end",
        "engine/forward_hooks:_is_redirected",
    ),
    "guard": (
        "_torch/ranks/exchange:RankExchange.joint",
        "interventions/effects/score_clip:ScoreClip._on_step",
        "interventions/run/score_replay:replay",
    ),
}
"""Places at which one failing rank once left the others waiting."""


def plant(rank: int, folder: str) -> dict[Any, Outcome]:
    """Return the outcome of each run by (preset, place of the fault)."""
    outcomes: dict[Any, Outcome] = {("unwatched", ""): run(None, None)}
    for config in ("observe", "guard"):
        seen: dict[str, None] = {}
        outcomes[config, ""] = run(
            config, None, trace=lambda place, seen=seen: seen.setdefault(place)
        )
        found: list[Any] = [sorted(seen)]
        dist.broadcast_object_list(found, src=1)
        others = [place for place in found[0] if place not in ALWAYS[config]]
        drawn = random.Random(SEED).sample(others, SAMPLE)
        for place in (*ALWAYS[config], *drawn):
            outcomes[config, place] = run(config, place)
    return outcomes


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> list[dict[Any, Outcome]]:
    folder = tmp_path_factory.mktemp("faults")
    on_ranks([plant], folder, seconds=170, wait=40)
    return given_by(plant, folder)


def test_the_unfaulted_guard_clips_and_the_ranks_agree(outcomes) -> None:
    first, second = (each["guard", ""] for each in outcomes)
    assert "qk_clip" in first.applied
    assert first.applied == second.applied
    assert same_weights(first, second)


@pytest.mark.parametrize("config", ["observe", "guard"])
def test_training_goes_on_with_equal_weights_after_a_fault_on_one_rank(outcomes, config) -> None:
    first, second = outcomes
    places = [place for of, place in first if of == config and place]
    assert len(places) == SAMPLE + len(ALWAYS[config])
    for place in places:
        here, there = first[config, place], second[config, place]
        assert all(map(math.isfinite, here.losses + there.losses)), place
        assert same_weights(here, there), place
        if config == "observe":
            assert same_weights(here, first["unwatched", ""]), place
    assert sum(second[config, place].fired for place in places) >= len(ALWAYS[config])


def test_a_fault_is_reported_on_its_rank(outcomes) -> None:
    for (config, place), there in outcomes[1].items():
        if place in ALWAYS.get(config, ()):
            assert any(place in line for line in there.lines), (place, there.lines)


def test_a_sampled_step_costs_one_collective_and_others_none(outcomes) -> None:
    opening = 3  # the first step also compares steps and models, and ends that together
    assert outcomes[0]["observe", ""].collectives == (opening + outcomes[0]["observe", ""].samples)
