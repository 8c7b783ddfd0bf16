"""Each signal of a row against scipy or the definition in float64, against cases worked by hand,
and at its bounds.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
import scipy.special
import scipy.stats
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabmon.operator import AttentionOperator, attention_operator, operator_of_scores
from stabmon.signals import (
    SIGNALS,
    attention_entropy,
    collision_probability,
    effective_keys,
    max_logit,
    max_probability,
    normalized_entropy,
    precision_bits,
    saturated_fraction,
    sink_mass,
    softmax_jacobian_norm,
)
from tests.support.signal_rows import operator_of_rows, random_call, softmax

Oracle = Callable[[np.ndarray], np.ndarray]
"""Logits ``[B, H, Q, K]`` with -inf where hidden -> ``[B, H, Q]``."""


def visible_count(z: np.ndarray) -> np.ndarray:
    return (z > -np.inf).sum(-1)


def entropy(z: np.ndarray) -> np.ndarray:
    return np.nan_to_num(scipy.stats.entropy(softmax(z), axis=-1))


def normalized(z: np.ndarray) -> np.ndarray:
    n = visible_count(z)
    return np.where(n > 1, entropy(z) / np.log(np.maximum(n, 2)), 0.0)


def top_probability(z: np.ndarray) -> np.ndarray:
    return np.nan_to_num(np.exp(z.max(-1) - scipy.special.logsumexp(z, axis=-1)))


def jacobian_norm(z: np.ndarray) -> np.ndarray:
    p = softmax(z)
    return np.linalg.norm(
        p[..., :, None] * np.eye(p.shape[-1]) - p[..., :, None] * p[..., None, :], axis=(-2, -1)
    )


def first_mass(z: np.ndarray) -> np.ndarray:
    first = (z > -np.inf).any(axis=(1, 2)).argmax(-1)
    return np.take_along_axis(softmax(z), first[:, None, None, None], axis=-1)[..., 0]


def bits(z: np.ndarray) -> np.ndarray:
    with np.errstate(divide="ignore"):
        return np.log2(np.abs(np.where(z > -np.inf, z, 0.0)).max(-1) / (2 * np.arctanh(0.1)))


ORACLES: dict[str, Oracle] = {
    "attention_entropy": entropy,
    "normalized_entropy": normalized,
    "collision_probability": lambda z: (softmax(z) ** 2).sum(-1),
    "effective_keys": lambda z: np.where(
        visible_count(z) > 0, 1 / np.maximum((softmax(z) ** 2).sum(-1), 1e-300), 0.0
    ),
    "max_logit": lambda z: z.max(-1),
    "max_probability": top_probability,
    "sink_mass": first_mass,
    "softmax_jacobian_norm": jacobian_norm,
    "precision_bits": bits,
}
BOUNDS: dict[str, Callable[[np.ndarray], tuple[object, object]]] = {
    "attention_entropy": lambda z: (0.0, np.log(np.maximum(visible_count(z), 1))),
    "normalized_entropy": lambda z: (0.0, 1.0),
    "collision_probability": lambda z: (1 / np.maximum(visible_count(z), 1), 1.0),
    "effective_keys": lambda z: (1.0, np.maximum(visible_count(z), 1)),
    "max_probability": lambda z: (1 / np.maximum(visible_count(z), 1), 1.0),
    "sink_mass": lambda z: (0.0, 1.0),
    "softmax_jacobian_norm": lambda z: (0.0, 2**-0.5),
    "saturated_fraction": lambda z: (0.0, 1.0),
}
OF_NOTHING = {
    "max_logit": -math.inf,
    "precision_bits": -math.inf,
    "hnf_log_curvature": -math.inf,
    "saturated_fraction": 1.0,
}
"""What a signal is for a row that sees nothing, where that is not 0; no head's value counts such a
row.
"""
SHIFT_INVARIANT = [name for name in ORACLES if name not in ("max_logit", "precision_bits")]


def signal(name: str) -> Callable[[AttentionOperator], Tensor]:
    return SIGNALS[name].function


@pytest.mark.parametrize("spread", [0.1, 1.0, 10.0])
@pytest.mark.parametrize("name", ORACLES)
def test_a_signal_is_its_definition(name: str, spread: float) -> None:
    operator, logits, _, _ = random_call(spread=spread)
    found, wanted = signal(name)(operator).double().numpy(), ORACLES[name](logits)
    np.testing.assert_allclose(
        found, wanted, rtol=1e-5 * max(1, spread), atol=2e-5 * max(1, spread)
    )


@pytest.mark.parametrize("name", ORACLES)
def test_float64_inputs_give_float64_digits(name: str) -> None:
    operator, logits, _, _ = random_call(dtype=torch.float64)
    found = signal(name)(operator)
    assert found.dtype == torch.float64
    np.testing.assert_allclose(
        found.numpy(),
        ORACLES[name](logits),
        rtol=1e-10,
        atol=1e-7 if name == "softmax_jacobian_norm" else 1e-10,
    )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ORACLES)
def test_half_inputs_are_taken_at_their_own_value(name: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(1, 2, 24, 8, generator=generator).to(dtype) for _ in range(2))
    found = signal(name)(attention_operator(query, key, scale=0.35))
    wanted = ORACLES[name]((0.35 * query.double() @ key.double().mT).numpy())
    np.testing.assert_allclose(found.numpy(), wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", BOUNDS)
@given(seed=st.integers(0, 1000), spread=st.floats(0, 50))
@settings(max_examples=25, deadline=None, derandomize=True)
def test_a_signal_stays_within_its_bounds(name: str, seed: int, spread: float) -> None:
    operator, logits, _, _ = random_call(seed, spread)
    found = signal(name)(operator).double().numpy()
    low, high = BOUNDS[name](logits)
    seen = visible_count(logits) > 0
    assert (found >= np.asarray(low) * (1 - 1e-4))[seen].all()
    assert (found <= np.asarray(high) * (1 + 1e-4) + 1e-5)[seen].all()


@pytest.mark.parametrize("name", SHIFT_INVARIANT)
def test_the_same_number_added_to_every_score_of_a_row_changes_nothing(name: str) -> None:
    rows = torch.randn(1, 2, 5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    shifts = torch.linspace(-30, 30, 5, dtype=torch.float64)[:, None]
    moved = signal(name)(operator_of_scores(rows + shifts))
    torch.testing.assert_close(moved, signal(name)(operator_of_scores(rows)), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("name", [name for name in ORACLES if name != "sink_mass"])
def test_the_order_of_keys_does_not_matter(name: str) -> None:
    rows = torch.randn(1, 2, 5, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    found = signal(name)(operator_of_scores(rows.flip(-1)))
    torch.testing.assert_close(found, signal(name)(operator_of_scores(rows)), rtol=1e-9, atol=1e-7)


@pytest.mark.parametrize("name", list(SIGNALS))
def test_a_row_that_sees_nothing_is_no_nan(name: str) -> None:
    operator, _, _, _ = random_call()
    if name == "hnf_log_curvature_bound":  # of the head's norms, whatever the row sees
        assert signal(name)(operator).isfinite().all()
        return
    empty = operator.n_visible() == 0
    assert empty.any()
    assert signal(name)(operator)[empty].unique().tolist() == [OF_NOTHING.get(name, 0.0)]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    "name", [name for name in SIGNALS if not name.startswith(("hnf", "saturated", "exp"))]
)
def test_a_nan_or_inf_score_shows_in_its_own_row_only(name: str, bad: float) -> None:
    scores = torch.randn(1, 1, 4, 20, generator=torch.Generator().manual_seed(0))
    clean = signal(name)(operator_of_scores(scores))
    scores[0, 0, 2, 7] = bad
    found = signal(name)(operator_of_scores(scores))
    assert not found[0, 0, 2].isfinite()
    torch.testing.assert_close(found[..., [0, 1, 3]], clean[..., [0, 1, 3]])


@pytest.mark.parametrize("n", [1, 2, 7, 64])
def test_a_uniform_row_worked_by_hand(n: int) -> None:
    operator = operator_of_rows([0.25] * n)

    def value(function: Callable[[AttentionOperator], Tensor]) -> float:
        return function(operator).item()

    assert value(attention_entropy) == pytest.approx(math.log(n), abs=1e-6)
    assert value(normalized_entropy) == pytest.approx(1.0 if n > 1 else 0.0, abs=1e-6)
    assert value(collision_probability) == pytest.approx(1 / n, rel=1e-6)
    assert value(effective_keys) == pytest.approx(n, rel=1e-6)
    assert value(max_probability) == pytest.approx(1 / n, rel=1e-6)
    assert value(sink_mass) == pytest.approx(1 / n, rel=1e-6)
    assert value(max_logit) == pytest.approx(0.25)
    assert value(softmax_jacobian_norm) == pytest.approx(
        math.sqrt(1 / n - 2 / n**2 + 1 / n**2), abs=1e-4
    )
    assert value(precision_bits) == pytest.approx(math.log2(0.25 / (2 * math.atanh(0.1))), abs=1e-5)
    assert value(saturated_fraction) == (1.0 if n == 1 else 0.0)


def test_a_one_hot_row_worked_by_hand() -> None:
    operator = operator_of_rows([200.0, -300.0, 0.0, 10.0])
    assert attention_entropy(operator).item() == 0.0
    assert collision_probability(operator).item() == pytest.approx(1.0, rel=1e-4)
    assert max_probability(operator).item() == pytest.approx(1.0, rel=1e-4)
    assert sink_mass(operator).item() == 1.0
    assert softmax_jacobian_norm(operator).item() == pytest.approx(0.0, abs=1e-2)
    assert saturated_fraction(operator).item() == 1.0
    assert max_logit(operator).item() == pytest.approx(200.0, rel=1e-6)
    assert precision_bits(operator).item() == pytest.approx(
        math.log2(300 / (2 * math.atanh(0.1))), rel=1e-6
    )


def test_two_keys_worked_by_hand() -> None:
    """p = (3/4, 1/4): entropy ln 4 - 3/4 ln 3, collision 5/8, Jacobian 3/16 * [[1, -1], [-1, 1]] of
    norm 3/8.
    """
    operator = operator_of_rows([math.log(3), 0.0])
    assert attention_entropy(operator).item() == pytest.approx(
        math.log(4) - 0.75 * math.log(3), rel=1e-6
    )
    assert collision_probability(operator).item() == pytest.approx(5 / 8, rel=1e-6)
    assert softmax_jacobian_norm(operator).item() == pytest.approx(3 / 8, rel=1e-5)


def test_the_largest_score_is_the_one_before_a_softcap() -> None:
    query, key = torch.ones(1, 1, 1, 1), torch.tensor([60.0, -80.0])[None, None, :, None]
    operator = attention_operator(query, key, scale=1.0, softcap=50.0)
    assert max_logit(operator).item() == pytest.approx(60.0, rel=1e-6)
    capped = 50 * math.tanh(1.6)
    assert precision_bits(operator).item() == pytest.approx(
        math.log2(capped / (2 * math.atanh(0.1))), rel=1e-5
    )


def test_a_learned_sink_takes_probability_but_is_no_score() -> None:
    scores = torch.tensor([[[[0.0, 0.0]]]])
    operator = operator_of_scores(scores, sinks=torch.tensor([math.log(2.0)]))
    assert max_logit(operator).item() == 0.0
    assert max_probability(operator).item() == pytest.approx(1 / 4)
    assert attention_entropy(operator).item() == pytest.approx(1.5 * math.log(2))
    assert normalized_entropy(operator).item() == pytest.approx(1.5 * math.log(2) / math.log(3))


@pytest.mark.parametrize("where", [0, 9])
def test_sink_mass_follows_the_first_key_that_padding_leaves(where: int) -> None:
    mask = torch.arange(20) >= where
    key = torch.zeros(1, 1, 20, 1)
    key[0, 0, where] = 5.0
    operator = attention_operator(
        torch.ones(1, 1, 20, 1), key, scale=1.0, mask=mask, is_causal=True
    )
    last = math.exp(5) / (math.exp(5) + 19 - where)
    assert sink_mass(operator)[0, 0, -1].item() == pytest.approx(last, rel=1e-5)


@given(
    scores=st.lists(st.floats(-60, 60), min_size=2, max_size=12),
    signs=st.integers(0, 2**12 - 1),
    shares=st.lists(st.floats(0, 1), min_size=12, max_size=12),
)
@settings(max_examples=200, deadline=None, derandomize=True)
def test_rounding_scores_to_precision_bits_moves_the_softmax_by_no_more_than_a_tenth(
    scores: list[float], signs: int, shares: list[float]
) -> None:
    z = np.array(scores)
    needed = precision_bits(operator_of_rows(scores, dtype=torch.float64)).item()
    error = 2.0 ** (math.log2(np.abs(z).max()) - needed) if math.isfinite(needed) else 0.0
    direction = np.array([share if signs >> i & 1 else -share for i, share in enumerate(shares)])[
        : len(z)
    ]
    moved = scipy.special.softmax(z + error * direction)
    assert 0.5 * np.abs(moved - scipy.special.softmax(z)).sum() <= 0.1 + 1e-9


def test_the_precision_bound_is_sharp() -> None:
    """Two keys at distance 2 atanh(0.1) that rounding moves past each other by as much."""
    eta = 2 * math.atanh(0.1)
    z = np.array([-eta / 2, eta / 2])
    needed = precision_bits(operator_of_rows(z.tolist(), dtype=torch.float64)).item()
    error = 2.0**-needed * np.abs(z).max()
    moved = scipy.special.softmax(z + error * np.array([1, -1]))
    assert 0.5 * np.abs(moved - scipy.special.softmax(z)).sum() == pytest.approx(0.1, rel=1e-6)
