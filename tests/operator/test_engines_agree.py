"""Every engine gives every statistic of every kind of attention call as the definitions do."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from stabmon.operator import STATISTICS, attention_operator, operator_of_scores
from tests.support.operator_cases import CASES, ENGINES, Case, assert_statistic, plain, truth


def check(case: Case, engine: str, float32: bool | None = None) -> None:
    expected = truth(case)
    visible = expected.scores[expected.visible & expected.scores.isfinite()]
    largest = visible.abs().max().item() if visible.numel() else 0.0
    operator = case.operator(engine)
    operator.prepare(STATISTICS)
    for name, wanted in expected.statistics().items():
        found = operator._get(name)
        assert found.shape == case.query.shape[:3]
        summed = (
            case.key.shape[2] if engine == "fused" and name in ("mean_score", "entropy") else 0
        )  # by the kernel, with its output
        assert_statistic(
            name, found, wanted, largest, engine != "dense" if float32 is None else float32, summed
        )
    assert torch.equal(operator.n_visible(), expected.visible.sum(-1))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_every_statistic_is_what_the_definition_says(name: str, engine: str) -> None:
    check(CASES[name], engine)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("name", CASES)
def test_no_statistic_of_finite_inputs_is_nan(name: str, engine: str) -> None:
    operator = CASES[name].operator(engine)
    operator.prepare(STATISTICS)
    assert [statistic for statistic in STATISTICS if operator._get(statistic).isnan().any()] == []


@pytest.mark.parametrize("engine", ENGINES)
def test_a_statistic_asked_for_alone_is_the_same_as_all_asked_for_together(engine: str) -> None:
    case = CASES["softcap, bias and sinks"]
    together = case.operator(engine)
    together.prepare(STATISTICS)
    for name in STATISTICS:
        torch.testing.assert_close(
            case.operator(engine)._get(name), together._get(name), rtol=1e-6, atol=1e-6
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_half_and_double_inputs_lose_nothing(dtype: torch.dtype, engine: str) -> None:
    case = plain(is_causal=True, key_heads=2)
    check(
        Case(case.query.to(dtype), case.key.to(dtype), case.options),
        engine,
        float32=None if dtype != torch.float64 else False,
    )


@pytest.mark.parametrize("engine", ENGINES)
def test_inputs_need_not_be_contiguous(engine: str) -> None:
    case = plain(
        is_causal=True, queries=24, keys=24, mask=torch.ones(24, 48, dtype=torch.bool)[:, ::2]
    )
    query = case.query.transpose(1, 2).contiguous().transpose(1, 2)
    key = case.key.mT.contiguous().mT
    assert not query.is_contiguous()
    assert not key.is_contiguous()
    check(Case(query, key, case.options), engine)


@pytest.mark.parametrize("engine", ["blockwise", "fused"])
def test_rows_longer_than_a_block_are_folded_over_key_blocks(engine: str) -> None:
    generator = torch.Generator().manual_seed(0)
    keys = (1 << 14) + (1 << 13) + 77
    query, key = (
        torch.randn(1, 2, 3, 8, generator=generator),
        torch.randn(1, 1, keys, 8, generator=generator),
    )
    key[:, :, ::1000] *= 10  # rows whose maximum lies in a later block than the first
    for options in (
        {},
        {"sinks": torch.tensor([3.0, 40.0])},
        {"softcap": 4.0},
        {"is_causal": True, "window": keys - 100},
    ):
        check(Case(query, key, options, scale=0.5), engine)


def test_blocks_of_hidden_keys_before_and_after_the_visible_ones_change_nothing() -> None:
    keys = 40_000
    mask = torch.zeros(1, 1, 2, keys, dtype=torch.bool)
    mask[..., 0, 3:9] = True
    mask[..., 1, -5:] = True
    generator = torch.Generator().manual_seed(0)
    case = Case(
        torch.randn(1, 2, 2, 4, generator=generator),
        torch.randn(1, 2, keys, 4, generator=generator),
        {"mask": mask},
    )
    check(case, "blockwise")
    check(case, "fused")


def scores_of(*rows: list[float]) -> Case:
    """A call whose scores are these rows: one-hot queries pick a component of each key."""
    return Case(
        torch.eye(len(rows))[None, None],
        torch.tensor(rows).T.contiguous()[None, None],
        {},
        scale=1.0,
    )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_visible_nan_or_inf_score_makes_its_own_row_nan_and_no_other(
    engine: str, bad: float
) -> None:
    key = torch.randn(1, 1, 6, 1, generator=torch.Generator().manual_seed(0))
    key[0, 0, 3] = bad
    operator = attention_operator(
        torch.ones(1, 1, 6, 1), key, scale=1.0, is_causal=True, engine=engine
    )
    for statistic in ("log_partition", "log_partition_2", "entropy", "mean_score"):
        rows = operator._get(statistic)[0, 0]
        assert not rows[3:].isfinite().any(), statistic
        if statistic in ("entropy", "mean_score"):
            assert rows[3:].isnan().all(), statistic
        assert rows[:3].isfinite().all(), statistic
    assert not operator.max_score()[0, 0, 3:].isfinite().any()
    expected = truth(
        Case(torch.ones(1, 1, 3, 1), key[:, :, :3], {"is_causal": True}, scale=1.0)
    ).statistics()
    assert_statistic("entropy", operator.entropy()[..., :3], expected["entropy"], 3.0)


@pytest.mark.parametrize("engine", ENGINES)
def test_a_visible_score_of_minus_inf_is_a_key_of_probability_zero(engine: str) -> None:
    key = torch.tensor([0.3, -math.inf, 1.2, -0.4])[None, None, :, None]
    operator = attention_operator(torch.ones(1, 1, 2, 1), key, scale=1.0, engine=engine)
    without = torch.tensor([0.3, 1.2, -0.4], dtype=torch.float64)
    p = without.softmax(0)
    assert operator.log_partition()[0, 0, 0].item() == pytest.approx(
        without.logsumexp(0).item(), abs=1e-6
    )
    assert operator.entropy()[0, 0, 0].item() == pytest.approx(
        -(p * p.log()).sum().item(), abs=1e-6
    )
    assert operator.max_score()[0, 0].tolist() == [pytest.approx(1.2, rel=1e-6)] * 2
    assert operator.min_score()[0, 0].tolist() == [-math.inf] * 2


@pytest.mark.parametrize("engine", ENGINES)
def test_what_is_hidden_may_be_nan(engine: str) -> None:
    case = plain(mask=torch.arange(37) < 30)
    key = case.key.clone()
    key[:, :, 30:] = math.nan
    for name, wanted in truth(case).statistics().items():
        assert_statistic(
            name,
            Case(case.query, key, case.options).operator(engine)._get(name),
            wanted,
            8.0,
            engine != "dense",
        )


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_scores_that_a_model_formed_itself_give_the_same_as_query_and_key(
    engine: str, softcap: float | None
) -> None:
    case = plain(is_causal=True, softcap=softcap)
    expected = truth(case)
    given_scores = expected.scores.float().masked_fill(~expected.visible, -math.inf)
    operator = operator_of_scores(given_scores, softcap=softcap, engine=engine)
    for name, wanted in expected.statistics().items():
        assert_statistic(name, operator._get(name), wanted, 8.0)
    assert torch.equal(operator.n_visible(), expected.visible.sum(-1))


@pytest.mark.parametrize("engine", ENGINES)
def test_given_scores_are_left_as_they_were(engine: str) -> None:
    scores = torch.randn(1, 2, 5, 6, generator=torch.Generator().manual_seed(0))
    before = scores.clone()
    operator_of_scores(scores, engine=engine).prepare(STATISTICS)
    assert torch.equal(scores, before)


@pytest.mark.parametrize("engine", ["blockwise", "fused"])
def test_a_saturated_row_keeps_the_digits_of_what_little_is_left(engine: str) -> None:
    operator = scores_of([0.0, -20.0, -30.0], [-60.0, 0.0, -200.0], [5.0, 5.0, -40.0]).operator(
        engine
    )
    wanted = [math.log(math.exp(-20) + math.exp(-30)), -60.0, math.log1p(math.exp(-45))]
    assert operator.log_odds_of_rest()[0, 0].tolist() == pytest.approx(wanted, rel=1e-6, abs=1e-6)
    assert operator.entropy()[0, 0, 1].item() == pytest.approx(61 * math.exp(-60), rel=1e-3)


@given(
    batch=st.integers(1, 3),
    key_heads=st.integers(1, 3),
    groups=st.integers(1, 3),
    queries=st.integers(1, 70),
    keys=st.integers(1, 70),
    dim=st.integers(1, 12),
    is_causal=st.booleans(),
    window=st.none() | st.integers(1, 80),
    softcap=st.none() | st.floats(0.5, 20),
    hidden=st.none() | st.floats(0, 1),
    per_head=st.booleans(),
    spread=st.sampled_from([0.1, 1.0, 30.0]),
    sink=st.booleans(),
    seed=st.integers(0, 10_000),
)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_any_geometry_gives_what_the_definition_says(
    batch: int,
    key_heads: int,
    groups: int,
    queries: int,
    keys: int,
    dim: int,
    is_causal: bool,
    window: int | None,
    softcap: float | None,
    hidden: float | None,
    per_head: bool,
    spread: float,
    sink: bool,
    seed: int,
) -> None:
    generator = torch.Generator().manual_seed(seed)
    heads = key_heads * groups
    query = spread * torch.randn(batch, heads, queries, dim, generator=generator)
    key = torch.randn(batch, key_heads, keys, dim, generator=generator)
    mask = None
    if hidden is not None:
        mask = (
            torch.rand(batch, heads if per_head else 1, queries, keys, generator=generator)
            >= hidden
        )
    sinks = torch.randn(heads, generator=generator) if sink else None
    options = {
        "is_causal": is_causal,
        "window": window,
        "softcap": softcap,
        "mask": mask,
        "sinks": sinks,
    }
    for engine in ENGINES:
        check(Case(query, key, options, scale=dim**-0.5), engine)
