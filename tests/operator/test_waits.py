"""Off the CPU nothing is read from the device, for which the host would wait.

Tensors on torch's ``meta`` device raise wherever a value is read, and take the way of every device
that is not the CPU.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import nn

import stabmon
from stabmon.operator import STATISTICS, attention_operator, operator_of_scores
from stabmon.operator.blockwise import BlockwiseAttention
from stabmon.operator.visibility.mask_summary import _make_summary, _summary_at_once
from stabmon.signals import SIGNALS, measure
from tests.support.operator_cases import CASES, assert_statistic, truth
from tests.support.small_runs import Attention

OPTIONS: dict[str, Mapping[str, Any]] = {
    "full": {},
    "causal": {"is_causal": True},
    "window": {"is_causal": True, "window": 50},
    "softcap": {"is_causal": True, "softcap": 20.0},
    "sinks": {"is_causal": True, "sinks": torch.empty(4, device="meta")},
}


class WithoutReading(BlockwiseAttention):
    """The way of devices for which the host would have to wait, on the CPU."""

    _with_care = True
    _sums = BlockwiseAttention._sums_without_reading


@pytest.mark.parametrize("engine", ["blockwise", "fused"])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_signals_of_a_call_are_measured_without_reading(
    options: Mapping[str, Any], dtype: torch.dtype, engine: str
) -> None:
    query = torch.empty(2, 4, 600, 16, dtype=dtype, device="meta")
    key = torch.empty(2, 2, 600, 16, dtype=dtype, device="meta")
    with pytest.raises(RuntimeError, match="meta"):
        query.sum().item()
    operator = attention_operator(query, key, scale=0.25, engine=engine, **options)
    found = measure(operator, list(SIGNALS))
    assert {each.total.shape for each in found.values()} == {(4,)}


def test_a_sampled_forward_reads_nothing() -> None:
    with torch.device("meta"):
        model = nn.Sequential(Attention(), Attention())
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        model(torch.empty(2, 16, 32, device="meta")).sum().backward()
        sums = monitor._observer.measurements.sums
        assert list(sums) == ["0", "1"]
        assert all(each.total.is_meta for signals in sums.values() for each in signals.values())
        assert not monitor.errors


@pytest.mark.parametrize("name", CASES)
def test_statistics_without_reading_are_what_the_definition_says(name: str) -> None:
    case, expected = CASES[name], truth(CASES[name])
    visible = expected.scores[expected.visible & expected.scores.isfinite()]
    largest = visible.abs().max().item() if visible.numel() else 0.0
    given = case.operator("blockwise")
    operator = WithoutReading(
        given.query,
        given.key,
        given.scale,
        given.visibility,
        given.softcap,
        given.sinks,
        given.given_scores,
    )
    operator.prepare(STATISTICS)
    for statistic, wanted in expected.statistics().items():
        assert_statistic(statistic, operator._get(statistic), wanted, largest)


@pytest.mark.parametrize("gap", [0.0, 1e-3, 1.0, 20.0, 60.0, 88.0])
@pytest.mark.parametrize("ties", [1, 3])
def test_the_rest_of_a_saturated_row_keeps_its_digits(gap: float, ties: int) -> None:
    """Of scores ``[0] * ties + [-gap]`` the odds of all but one largest are ties - 1 + e^-gap."""
    given = operator_of_scores(torch.tensor([0.0] * ties + [-gap])[None, None, None])
    operator = WithoutReading(
        *(given.query, given.key, given.scale, given.visibility, None, None, given.given_scores)
    )
    rest = torch.tensor(ties - 1 + float(torch.tensor(-gap).double().exp())).double()
    torch.testing.assert_close(
        operator.log_odds_of_rest().double().view(()), rest.log(), rtol=1e-5, atol=1e-6
    )
    total = 1 + rest
    squares = (ties + torch.tensor(-2 * gap).double().exp()) / total**2
    torch.testing.assert_close(operator.collision().double().view(()), squares, rtol=1e-6, atol=0)


@pytest.mark.parametrize(
    "name", [name for name, case in CASES.items() if case.options.get("mask") is not None]
)
def test_a_mask_is_summarized_alike_with_one_read(name: str) -> None:
    mask = CASES[name].operator("blockwise").visibility.mask
    assert mask is not None
    wanted, found = _make_summary(mask), _summary_at_once(mask)
    for field in ("floor", "is_bias", "hides"):
        assert getattr(found, field) == getattr(wanted, field)
    for field in ("n_visible", "first", "last"):
        assert torch.equal(getattr(found, field), getattr(wanted, field))
    assert (found.seen is None) == (wanted.seen is None)
    assert found.seen is None or torch.equal(found.seen, wanted.seen)
