"""Near one-hot rows in float32: what is left beside the largest key must not drown in rounding."""

import pytest
import torch

from stabmon import signals
from stabmon.operator import operator_of_scores


@pytest.mark.parametrize("offset", [0.0, 1500.0])
@pytest.mark.parametrize("gap", [0.5, 3.0, 6.0, 9.0, 15.0, 30.0])
def test_jacobian_collision_and_largest_probability_keep_their_digits(
    gap: float, offset: float
) -> None:
    tail = torch.randn(50, generator=torch.Generator().manual_seed(1), dtype=torch.float64) - gap
    z = torch.cat([torch.zeros(1, dtype=torch.float64), tail]) + offset
    z = z.float().double()  # the same numbers for both
    p = torch.softmax(z, -1)
    rest = p.sum() - p.max()
    one = operator_of_scores(z.float().view(1, 1, 1, -1), engine="blockwise")
    jacobian = float((torch.diag(p) - torch.outer(p, p)).norm())
    near = 3e-4 if offset else 3e-5  # a score of 1500 has digits down to 1e-4
    assert float(signals.softmax_jacobian_norm(one)) == pytest.approx(
        jacobian, rel=max(near, 2e-3 if jacobian < 0.05 else 0)
    )
    assert float(signals.collision_probability(one)) == pytest.approx(
        float(p.square().sum()), rel=near
    )
    assert float(signals.max_probability(one)) == pytest.approx(float(p.max()), rel=near)
    assert float(one.log_odds_of_rest().exp()) == pytest.approx(float(rest / p.max()), rel=1e-3)
