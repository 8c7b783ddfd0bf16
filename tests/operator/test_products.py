"""Products with the operator: A x, A^T y, and the operator of some of the rows."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabmon.operator import STATISTICS
from tests.support.operator_cases import CASES, ENGINES, Case, assert_statistic, plain, truth

FINITE_SCORES = [name for name in CASES if name != "large scores"]


def randn(*shape: int, seed: int = 3) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_products_are_those_of_the_rows_written_out(name: str, engine: str) -> None:
    case = CASES[name]
    batch, heads, queries, _ = case.query.shape
    keys = case.key.shape[2]
    p = truth(case).probabilities
    x, y = randn(batch, heads, keys, 3), randn(batch, heads, queries, 3)
    operator = case.operator(engine)
    tolerance = {"rtol": 1e-5, "atol": 1e-4 if name == "large scores" else 3e-6}
    torch.testing.assert_close(operator.matvec(x).double(), p @ x.double(), **tolerance)
    torch.testing.assert_close(
        operator.rmatvec(y).double(), p.mT @ y.double(), rtol=1e-5, atol=3 * tolerance["atol"]
    )


@pytest.mark.parametrize("engine", ENGINES)
@given(
    groups=st.integers(1, 3),
    queries=st.integers(1, 50),
    keys=st.integers(1, 50),
    columns=st.integers(1, 20),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 60),
    hidden=st.none() | st.floats(0, 1),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_rmatvec_is_the_adjoint_of_matvec(
    engine: str,
    groups: int,
    queries: int,
    keys: int,
    columns: int,
    is_causal: bool,
    window: int | None,
    hidden: float | None,
    seed: int,
) -> None:
    mask = (
        None
        if hidden is None
        else torch.rand(1, 1, queries, keys, generator=torch.Generator().manual_seed(seed))
        >= hidden
    )
    options = {"is_causal": is_causal, "window": window, "mask": mask}
    case = Case(
        randn(2, 2 * groups, queries, 8, seed=seed), randn(2, 2, keys, 8, seed=seed + 1), options
    )
    operator = case.operator(engine)
    x, y = (
        randn(2, 2 * groups, keys, columns, seed=seed + 2),
        randn(2, 2 * groups, queries, columns, seed=seed + 3),
    )
    left = (operator.matvec(x).double() * y).sum()
    right = (x * operator.rmatvec(y).double()).sum()
    size = x.norm() * y.norm()
    assert abs(left - right) <= 1e-5 * size


@pytest.mark.parametrize("engine", ENGINES)
def test_rows_of_the_operator_sum_to_one_where_they_see_anything(engine: str) -> None:
    case = CASES["rows that see nothing"]
    operator = case.operator(engine)
    sums = operator.matvec(torch.ones(1, 1, 37, 1))[..., 0]
    torch.testing.assert_close(sums, operator.occupied.to(sums.dtype), rtol=0, atol=1e-6)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("heads", [1, 2, 6])
def test_values_may_be_given_once_or_for_each_key_head_or_each_query_head(
    engine: str, heads: int
) -> None:
    case = plain(heads=6, key_heads=2, is_causal=True)
    x = randn(1 if heads == 1 else 2, heads, 37, 5)
    expected = truth(case).probabilities @ x.double().repeat_interleave(6 // heads, dim=1)
    torch.testing.assert_close(
        case.operator(engine).matvec(x).double(), expected, rtol=1e-5, atol=3e-6
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", FINITE_SCORES)
def test_the_operator_of_some_rows_says_the_same_of_them(name: str, engine: str) -> None:
    case = CASES[name]
    queries = case.query.shape[2]
    index = torch.tensor(sorted({0, queries // 3, queries // 2, queries - 1}))
    chosen = case.operator(engine).rows(index)
    chosen.prepare(STATISTICS)
    expected = truth(case)
    for statistic, rows in expected.statistics().items():
        assert_statistic(
            statistic, chosen._get(statistic), rows[:, :, index], 12.0, engine != "dense"
        )
    assert torch.equal(chosen.n_visible(), expected.visible.sum(-1)[:, :, index])
    x = randn(case.key.shape[0], case.query.shape[1], case.key.shape[2], 2)
    torch.testing.assert_close(
        chosen.matvec(x).double(),
        (expected.probabilities @ x.double())[:, :, index],
        rtol=1e-5,
        atol=1e-5,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_values_of_a_wrong_shape_are_refused_with_the_shape_that_fits(engine: str) -> None:
    operator = plain(heads=6, key_heads=2).operator(engine)
    with pytest.raises(ValueError, match=r"\(2, 3, 37, 1\).*H=6, H_kv=2, K=37"):
        operator.matvec(torch.zeros(2, 3, 37, 1))
    with pytest.raises(ValueError, match=r"\(2, 6, 36, 1\).*H=6, Q=37"):
        operator.rmatvec(torch.zeros(2, 6, 36, 1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_row_blocks_are_the_rows_written_out_each_once(name: str, engine: str) -> None:
    case = CASES[name]
    p = truth(case).probabilities
    operator = case.operator(engine)
    for elements, reverse in (
        (1, False),
        (3 * operator.batch * operator.heads * operator.keys, True),
        (1 << 20, False),
    ):
        found, times = torch.zeros_like(p), torch.zeros(operator.queries)
        for block in operator.row_blocks(elements, reverse=reverse):
            found[:, :, block.rows, block.cols] = block.probabilities.double()
            times[block.rows] += 1
        torch.testing.assert_close(
            found, p, rtol=1e-5, atol=1e-4 if name == "large scores" else 3e-6
        )
        assert bool((times == 1).all())


@pytest.mark.parametrize("name", CASES)
def test_weights_of_some_samples_and_heads_are_cut_from_those_of_all(name: str) -> None:
    operator = CASES[name].operator("blockwise")
    rows = slice(operator.queries // 3, operator.queries)
    cols, everything = operator.probabilities_of(rows)
    some, heads = (
        slice(operator.batch - 1, operator.batch),
        slice(operator.heads // 2, operator.heads),
    )
    assert operator.probabilities_of(rows, some, heads)[0] == cols
    torch.testing.assert_close(
        operator.probabilities_of(rows, some, heads)[1],
        everything[some, heads],
        rtol=1e-6,
        atol=1e-7,
    )
