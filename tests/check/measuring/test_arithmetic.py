"""The closed forms against simulations and worked numbers."""

import math

import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy

from stabmon._torch.number_formats import FLOAT16_OVERFLOW, LARGEST, MANTISSA_BITS
from stabmon.check.measuring.arithmetic import (
    bits_needed,
    critical_spread,
    curvature_bits,
    expected_curvature,
    expected_entropy,
    expected_maximum,
)


@pytest.mark.parametrize(("sigma", "keys"), [(0.3, 64), (1.0, 1024), (2.0, 4096), (5.0, 256)])
def test_expected_entropy_is_that_of_simulated_rows(sigma: float, keys: int) -> None:
    rows = np.random.default_rng(0).normal(0, sigma, (400, keys))
    simulated = entropy(softmax(rows, axis=1), axis=1)
    assert expected_entropy(sigma, keys) == pytest.approx(
        simulated.mean(), abs=0.03 + simulated.std() / 2
    )


def test_entropy_is_ln_n_without_spread_and_little_beyond_the_critical_one() -> None:
    assert expected_entropy(0.0, 512) == pytest.approx(math.log(512))
    assert expected_entropy(2 * critical_spread(512), 512) < 0.15 * math.log(512)
    assert expected_entropy(1.0, 1) == 0.0


def test_a_softcap_keeps_the_spread_of_rows_that_would_condense() -> None:
    assert (
        expected_entropy(30.0, 256, softcap=1.0) > 0.8 * math.log(256) > expected_entropy(30.0, 256)
    )


def test_expected_maximum_bounds_the_mean_of_simulated_maxima_closely() -> None:
    simulated = np.random.default_rng(0).normal(0, 2.0, (500, 2048)).max(axis=1).mean()
    assert simulated <= expected_maximum(2.0, 2048) <= 1.2 * simulated


def test_rounding_within_the_bits_needed_moves_at_most_a_tenth() -> None:
    for largest in (1.0, 30.0, 1000.0):
        shift = largest * 2.0 ** -bits_needed(largest)
        assert math.tanh(shift / 2) == pytest.approx(0.1)
    assert bits_needed(0.0) == -math.inf


def test_curvature_bits_undo_the_second_order_term() -> None:
    bits = curvature_bits(0.3, 50.0)
    assert 0.3 * 4.0**-bits * 50.0 == pytest.approx(0.1)


def test_expected_curvature_is_the_bound_at_a_typical_row() -> None:
    from torch import Generator, randn

    from stabmon.operator import attention_operator
    from stabmon.signals import hnf_log_curvature

    generator, sigma, width, keys = Generator().manual_seed(0), 1.0, 64, 512
    query, key = (randn(1, 1, keys, width, generator=generator) * sigma**0.5 for _ in range(2))
    measured = float(hnf_log_curvature(attention_operator(query, key, scale=width**-0.5)).median())
    bound, _ = expected_curvature(sigma, keys, width, width**-0.5)
    assert math.log(bound) == pytest.approx(measured, abs=0.5)


@pytest.mark.parametrize("name", MANTISSA_BITS)
def test_a_format_keeps_its_bits_and_no_more(name: str) -> None:
    dtype, bits = getattr(torch, name), MANTISSA_BITS[name]
    whole = torch.tensor([2**bits, 2**bits + 1])
    assert (whole.to(dtype).to(torch.int64) == whole).tolist() == [True, False]


def test_float16_rounds_to_infinity_from_its_overflow_on() -> None:
    overflow = torch.tensor(FLOAT16_OVERFLOW)
    below = torch.nextafter(overflow, torch.tensor(0.0))
    assert [below.half().item(), overflow.half().item()] == [LARGEST["float16"], math.inf]
