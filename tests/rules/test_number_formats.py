"""The limits of float16's range and of the mantissas, per head."""

import numpy as np
import pytest

from stabmon.rules.overflow_risk import OverflowRisk
from stabmon.rules.precision_insufficient import PrecisionInsufficient
from tests.support.trajectories import info, readings, run, shape, signals


def products(value, dtype="float16", fused=False, count=1):
    """Readings whose unscaled query-key product is ``value`` (scale 1/8)."""
    return readings(
        signals(shape(np.full(count, value / 8)), shape(np.full(count, 0.5))),
        layer_info=info(dtype, fused=fused),
    )


@pytest.mark.parametrize(
    ("product", "severity"),
    [
        (16_000, None),
        (16_384, "warning"),
        (32_000, "warning"),
        (32_768, "error"),
        (np.inf, "critical"),
    ],
)
def test_overflow_rises_with_the_unscaled_product(product, severity):
    assert {i.severity for i in run(products(product), [OverflowRisk()])} == (
        {severity} if severity else set()
    )


@pytest.mark.parametrize(
    ("dtype", "fused"), [("float16", True), ("bfloat16", False), ("float32", False)]
)
def test_no_other_kernel_can_overflow(dtype, fused):
    assert not run(products(60_000, dtype, fused), [OverflowRisk()])


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_what_was_not_measured_cannot_overflow(value):
    assert not run(products(value), [OverflowRisk()])


def test_an_open_overflow_risk_closes_below_four_fifths():
    curve = np.array([17e3, 14e3, 14e3, 12e3, 12e3]) / 8
    watched = readings(
        signals(shape(curve), shape(np.full(5, 0.5))), layer_info=info("float16", fused=False)
    )
    assert {i.step for i in run(watched, [OverflowRisk()]) if i.state == "closed"} == {50}


def bits(values, dtype, fused):
    return readings(
        {"precision_bits": shape(np.asarray(values, dtype=float))},
        layer_info=info(dtype, fused=fused),
    )


@pytest.mark.parametrize(
    ("dtype", "need", "severity"),
    [
        ("bfloat16", 8.9, None),
        ("bfloat16", 9.0, "warning"),
        ("bfloat16", 10.0, "error"),
        ("float16", 11.9, None),
        ("float16", 13.0, "error"),
        ("float32", 20.0, None),
        ("float8_e4m3fn", 20.0, None),
    ],
)
def test_a_need_that_grew_beyond_the_mantissa(dtype, need, severity):
    found = run(bits([5.0] * 5 + [need] * 2, dtype, False), [PrecisionInsufficient()])
    assert {i.severity for i in found} == ({severity} if severity else set())


def test_a_shortage_from_the_first_reading_is_only_a_warning():
    assert {
        i.severity for i in run(bits([12.0] * 10, "bfloat16", False), [PrecisionInsufficient()])
    } == {"warning"}


def test_a_fused_kernel_averages_its_roundings_and_never_alarms():
    assert not run(bits([5.0] * 5 + [11.4], "bfloat16", True), [PrecisionInsufficient()])
    assert {
        i.severity
        for i in run(bits([5.0] * 5 + [16.0], "bfloat16", True), [PrecisionInsufficient()])
    } == {"warning"}


@pytest.mark.parametrize("value", [np.nan, -np.inf])
def test_unknown_bits_give_nothing(value):
    assert not run(bits([value] * 6, "bfloat16", False), [PrecisionInsufficient()])


@pytest.mark.parametrize("fused", [True, False])
def test_the_advice_is_the_way_to_more_bits_that_the_layer_does_not_use_yet(fused):
    found = run(bits([5.0] * 5 + [14.0] * 2, "bfloat16", fused), [PrecisionInsufficient()])
    assert found
    assert ("as a fused kernel does" in found[0].suggestion) == (not fused)
    assert ("queries and keys in float32" in found[0].suggestion) == fused
