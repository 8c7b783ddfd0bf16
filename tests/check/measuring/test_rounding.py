"""Rounding to a format against a plain calculation, theory's bound, and overflow."""

import math

import pytest
import torch

from stabmon.check.measuring.rounding import moved, rows_of
from stabmon.records import AttentionCall


def call(size: float, width: int = 32, **more: object) -> AttentionCall:
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(2, 2, 40, width, generator=generator) * size for _ in range(2))
    return AttentionCall("a", query, key, scale=width**-0.5, **more)  # type: ignore[arg-type]


def test_the_fused_path_rounds_queries_and_keys_alone() -> None:
    one = call(3.0)
    exact = rows_of(one, 40)
    q, k = (each.to(torch.bfloat16).double() for each in (one.query, one.key))
    expected = torch.softmax(q @ k.mT * one.scale, -1) - torch.softmax(
        one.query.double() @ one.key.double().mT * one.scale, -1
    )
    assert torch.allclose(moved(exact, torch.bfloat16, "fused"), expected.abs().sum(-1) / 2)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_eager_path_moves_more_and_stays_within_the_bound(dtype: torch.dtype) -> None:
    exact = rows_of(call(3.0, is_causal=True), 40)
    fused, eager = (moved(exact, dtype, path) for path in ("fused", "eager"))
    assert eager.mean() > fused.mean() > 0
    largest = float(exact.scores.masked_fill(exact.scores == -torch.inf, 0).abs().max())
    assert float(eager.max()) <= math.tanh(4 * largest * torch.finfo(dtype).eps / 2)
    assert eager[:, :, 0].max() == 0  # a row that sees one key alone cannot move


def test_a_product_beyond_float16_is_not_a_number_on_the_eager_path_only() -> None:
    exact = rows_of(call(60.0), 40)
    assert moved(exact, torch.float16, "eager").isnan().any()
    assert not moved(exact, torch.float16, "fused").isnan().any()
    assert not moved(exact, torch.bfloat16, "eager").isnan().any()


def test_float32_inputs_of_half_precision_models_do_not_move_at_all() -> None:
    one = call(1.0)
    halves = AttentionCall("a", one.query.bfloat16(), one.key.bfloat16(), scale=one.scale)
    assert moved(rows_of(halves, 40), torch.bfloat16, "fused").max() == 0


def test_rows_are_spread_over_the_positions_and_hold_the_last() -> None:
    exact = rows_of(call(1.0, is_causal=True), 5)
    assert exact.queries == 5
    assert exact.n_visible()[0, 0].tolist() == [1, 11, 21, 30, 40]
