"""Both budget rules and the cascade, on random preferences."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stabmon.analysis.kv_cache.budgets import filled, published, tokens_of
from stabmon.analysis.kv_cache.cache.cascade import Cascade, allot


def cases(count: int, seed: int) -> list[tuple[np.ndarray, int, int]]:
    """(preferences, total, cap): log-normal of any spread, some layers at 0, totals from scarce to
    more than enough.
    """
    random = np.random.default_rng(seed)
    made = []
    for _ in range(count):
        layers = int(random.integers(1, 33))
        claims = np.exp(random.normal(0, random.choice([0.1, 1.0, 3.0]), layers)) * (
            random.random(layers) > 0.05
        )
        cap = int(random.integers(1, 400))
        made.append((claims, int(random.integers(0, math.ceil(1.2 * cap * layers))), cap))
    return made


def described(claims: np.ndarray, total: int, cap: int) -> list[int]:
    """The published rule, from its description, in exact steps: cut, cap, deal the excess once,
    deal the shortfall once, cap.
    """
    wish = [int(share * total) for share in claims / claims.sum()]
    have = [min(each, cap) for each in wish]
    for keys in (sum(w - h for w, h in zip(wish, have, strict=True)), None):
        keys = total - sum(have) if keys is None else keys
        takers = [layer for layer in range(len(have)) if have[layer] < cap]
        if keys <= 0 or not takers:
            continue
        for place, layer in enumerate(takers):
            have[layer] += keys // len(takers) + (1 if place < keys % len(takers) else 0)
    return [min(each, cap) for each in have]


def test_filled_gives_out_every_key_in_proportion() -> None:
    for claims, total, cap in cases(600, seed=0):
        budgets, layers = filled(claims, total, cap), len(claims)
        assert budgets.sum() == min(total, cap * layers)
        assert budgets.min() >= (1 if total >= layers else 0)
        assert budgets.max() <= cap
        order = np.argsort(claims, kind="stable")
        assert (np.diff(budgets[order]) >= -1).all(), (
            "more for a larger claim, up to one key of rounding"
        )
        free = (budgets > 1) & (budgets < cap) & (claims > 0)
        if free.sum() > 1:  # those that neither bound holds are in proportion
            low, high = ((budgets[free] + move) / claims[free] for move in (-1, 1))
            assert low.max() <= high.min() * (1 + 1e-9)


def test_filled_does_not_depend_on_the_scale_of_claims() -> None:
    for claims, total, cap in cases(200, seed=1):
        assert np.abs(filled(claims, total, cap) - filled(claims * 1e-30, total, cap)).max() <= 1


def test_published_follows_its_description_and_never_exceeds_the_total() -> None:
    lost = 0
    for claims, total, cap in cases(2000, seed=2):
        if claims.sum() == 0:
            continue
        budgets = published(claims, total, cap)
        assert budgets.tolist() == described(claims, total, cap)
        assert budgets.sum() <= max(total, 0)
        lost += budgets.sum() < min(total, cap * len(claims))
    assert lost > 100, "the rule does leave keys unused"


def test_cascade_ends_at_the_one_shot_allotment() -> None:
    for claims, total, cap in cases(150, seed=3):
        cascade = Cascade([total], [cap], filled)
        for claim in claims:
            budgets = cascade.add(torch.tensor([claim]))
        assert np.abs(budgets - allot(claims[:, None], [total], [cap], filled)).max() <= 1
        for before, after in zip(cascade.stages, cascade.stages[1:], strict=False):
            assert (after[:-1] <= before).all(), "no layer gets keys back"
            assert after.sum() <= min(total, cap * len(after))


def test_samples_share_nothing() -> None:
    claims = np.array([[1.0, 5.0], [3.0, 1.0], [2.0, 2.0]])
    both = allot(claims, [30, 12], [20, 9], filled)
    for sample, (total, cap) in enumerate(((30, 20), (12, 9))):
        assert both[:, sample].tolist() == filled(claims[:, sample], total, cap).tolist()


@pytest.mark.parametrize("claims", [[1.0, float("nan")], [-1.0, 2.0], [float("inf"), 1.0], []])
@pytest.mark.parametrize("rule", [filled, published])
def test_claims_that_mean_nothing_are_refused(claims: list[float], rule: object) -> None:
    with pytest.raises(ValueError, match="one finite number of 0 or above"):
        rule(claims, 10, 10)  # type: ignore[operator]


def test_a_share_of_the_prompt_never_rounds_to_nothing() -> None:
    assert tokens_of(0.001, [10, 5000]) == [1, 5]
    assert tokens_of(1.0, [7]) == [7]
