"""The curvature bounds against the second derivative itself, in float64."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from stabmon.operator import AttentionOperator, attention_operator, operator_of_scores
from stabmon.signals import hnf_log_curvature, hnf_log_curvature_bound, saturated_fraction
from stabmon.signals.curvature import _largest_eigenvalue, _log_jacobian_eigenvalue
from tests.support.signal_rows import operator_of_rows, random_call


def curvature(query: Tensor, key: Tensor, beta: float, starts: int = 6) -> float:
    """Half the operator norm of the second derivative of softmax(beta K q) in q and K jointly, for
    one row.

    A symmetric bilinear map takes its norm at equal arguments: maximise |T(u, u)| by turns over the
    direction of the result and u. What is found is a local maximum, so never more than the norm.
    """
    keys, dim = key.shape

    def row(x: Tensor) -> Tensor:
        return torch.softmax(beta * x[dim:].view(keys, dim) @ x[:dim], 0)

    point = torch.cat([query, key.reshape(-1)])
    second = torch.func.hessian(row)(point)
    generator = torch.Generator().manual_seed(0)
    best = 0.0
    for _ in range(starts):
        along = torch.randn(keys, generator=generator, dtype=torch.float64)
        for _ in range(15):
            values, vectors = torch.linalg.eigh(torch.einsum("i,iab->ab", along, second))
            u = vectors[:, values.abs().argmax()]
            result = torch.einsum("iab,a,b->i", second, u, u)
            along = result / result.norm().clamp(min=1e-300)
        best = max(best, result.norm().item() / 2)
    return best


def call(
    seed: int, keys: int, dim: int, spread: float
) -> tuple[AttentionOperator, Tensor, Tensor, float]:
    generator = torch.Generator().manual_seed(seed)
    query = spread * torch.randn(dim, generator=generator, dtype=torch.float64)
    key = torch.randn(keys, dim, generator=generator, dtype=torch.float64)
    beta = dim**-0.5
    return (
        attention_operator(query[None, None, None], key[None, None], scale=beta),
        query,
        key,
        beta,
    )


def test_the_estimate_of_curvature_finds_a_known_one() -> None:
    """One key direction, two keys: softmax(beta K q) is a logistic; compare with a fine search over
    directions.
    """
    _, query, key, beta = call(3, keys=2, dim=1, spread=1.0)
    point = torch.cat([query, key.reshape(-1)])
    second = torch.func.hessian(lambda x: torch.softmax(beta * x[1:].view(2, 1) @ x[:1], 0))(point)
    directions = torch.nn.functional.normalize(
        torch.randn(200_000, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)),
        dim=1,
    )
    searched = (
        torch.einsum("iab,na,nb->ni", second, directions, directions).norm(dim=1).max().item() / 2
    )
    assert curvature(query, key, beta) == pytest.approx(searched, rel=1e-3)


@given(
    seed=st.integers(0, 10_000),
    keys=st.integers(2, 6),
    dim=st.integers(1, 3),
    spread=st.floats(0.0, 12.0),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_tight_bound_is_never_below_the_true_curvature(
    seed: int, keys: int, dim: int, spread: float
) -> None:
    operator, query, key, beta = call(seed, keys, dim, spread)
    assert curvature(query, key, beta, starts=3) <= math.exp(hnf_log_curvature(operator).item()) * (
        1 + 1e-9
    )


def test_the_tight_bound_is_within_a_factor_of_ten_where_the_classic_one_is_off_by_thousands() -> (
    None
):
    tight, classic = [], []
    for seed in range(8):
        operator, query, key, beta = call(seed, keys=6, dim=3, spread=4.0)
        true = curvature(query, key, beta)
        tight.append(math.exp(hnf_log_curvature(operator).item()) / true)
        classic.append(math.exp(hnf_log_curvature_bound(operator).item()) / true)
    assert 1 <= np.median(tight) < 10
    assert np.median(classic) > 1000


@given(scores=st.lists(st.floats(-40, 40), min_size=2, max_size=10))
@settings(max_examples=200, deadline=None, derandomize=True)
def test_the_jacobians_largest_eigenvalue_lies_between_the_bounds(scores: list[float]) -> None:
    """m(1 - m) <= lambda <= min(m, 2m(1 - m)), and the bound is not twice too large."""
    operator = operator_of_rows(scores, dtype=torch.float64)
    p = torch.softmax(torch.tensor(scores, dtype=torch.float64), 0)
    true = torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p))[-1].item()
    bound = math.exp(_log_jacobian_eigenvalue(operator).item())
    m = p.max().item()
    assert m * (1 - m) <= true * (1 + 1e-9) + 1e-15
    assert true <= bound * (1 + 1e-9) + 1e-15
    assert bound <= 2 * true * (1 + 1e-6) + 1e-14


def test_the_eigenvalue_of_a_saturated_row_keeps_its_digits_in_float32() -> None:
    for gap in (1.0, 10.0, 40.0, 80.0):
        found = _log_jacobian_eigenvalue(operator_of_rows([gap, 0.0])).item()
        r = math.exp(-gap)
        assert found == pytest.approx(
            min(-math.log1p(r), math.log(2) - gap - 2 * math.log1p(r)), rel=1e-5
        )


def test_the_classic_bound_is_the_printed_formula() -> None:
    operator, logits, query, key = random_call()
    found = hnf_log_curvature_bound(operator).double()
    seen = operator.occupied
    for b, h in np.ndindex(2, 4):
        q, k = query[b, h].double().numpy(), key[b, h // 2].double().numpy()
        sees = np.isfinite(logits[b, h])
        visible = np.where(sees, np.abs(logits[b, h]), 0.0).max(-1)
        q, k = q[sees.any(1)], k[sees.any(0)]  # padding left out
        wanted = np.log(np.linalg.norm(q)) + np.log(np.linalg.norm(k)) - np.log(8) + 2 * visible
        np.testing.assert_allclose(found[b, h].numpy(), wanted, rtol=1e-5, atol=1e-5)
    assert seen.any()


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 300, 16), (2, 5, 32), (1, 40, 1), (2, 50, 200)])
def test_the_spectral_norm_of_keys_is_bounded_closely_from_above(
    shape: tuple[int, int, int],
) -> None:
    """Over D equal singular values by D^(1/16) squared, at most 1.14 squared at D = 64."""
    key = torch.randn(1, *shape, generator=torch.Generator().manual_seed(0))
    true = torch.linalg.matrix_norm(key.double(), 2).square()
    found = _largest_eigenvalue(key.mT @ key).double()
    assert (found >= true * (1 - 1e-5)).all()
    assert (found <= true * shape[2] ** (1 / 16) * (1 + 1e-5)).all()


@pytest.mark.parametrize("size", [1e-12, 1e-3, 1e9])
@pytest.mark.parametrize("dim", [1, 64, 1024])
def test_the_spectral_norm_of_tiny_and_huge_keys_neither_vanishes_nor_overflows(
    size: float, dim: int
) -> None:
    one = torch.zeros(1, 1, 3, dim)
    one[..., 0, 0] = size
    assert _largest_eigenvalue(one.mT @ one).item() == pytest.approx(size**2, rel=1e-4)
    flat = torch.eye(dim)[None, None] * size
    assert _largest_eigenvalue(flat.mT @ flat).item() == pytest.approx(
        size**2 * dim ** (1 / 16), rel=1e-4
    )


def test_keys_that_are_all_zero_leave_the_tight_bound_finite() -> None:
    operator = attention_operator(torch.ones(1, 1, 3, 4), torch.zeros(1, 1, 5, 4), scale=0.5)
    assert hnf_log_curvature(operator).isfinite().all()


def test_a_row_of_one_key_has_no_curvature() -> None:
    operator = attention_operator(
        torch.ones(1, 1, 3, 4), torch.ones(1, 1, 3, 4), scale=0.5, is_causal=True
    )
    assert hnf_log_curvature(operator)[0, 0].isneginf().tolist() == [True, False, False]


def test_curvature_rises_with_the_scores_and_falls_once_the_row_saturates() -> None:
    values = []
    for size in (0.1, 2.0, 60.0):
        key = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
        operator = attention_operator(
            size * torch.tensor([[[[1.0, 0.0]]]], dtype=torch.float64), key[None, None], scale=1.0
        )
        values.append(hnf_log_curvature(operator).item())
    assert values[1] > values[0] > values[2]


def test_curvature_needs_queries_and_keys() -> None:
    operator = operator_of_scores(torch.randn(1, 2, 3, 4))
    assert hnf_log_curvature(operator).isnan().all()
    assert hnf_log_curvature_bound(operator).isnan().all()


def test_a_row_counts_as_saturated_below_a_thousandth() -> None:
    """2m(1 - m) = 1e-3 at ln r = -7.6: a gap of 7.5 passes a gradient still, one of 7.7 does
    not.
    """
    assert saturated_fraction(operator_of_rows([7.5, 0.0], [7.7, 0.0], [0.0, 0.0]))[
        0, 0
    ].tolist() == [0.0, 1.0, 0.0]
