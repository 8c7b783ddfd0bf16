"""Each signal against a float64 oracle written here with scipy, closed forms worked by hand, bounds and invariances."""

import math

import numpy as np
import pytest
import torch
from scipy.special import logsumexp, softmax
from scipy.stats import entropy
from torch import Tensor

from stabmon import signals
from stabmon.operator import attention_operator, operator_of_scores
from stabmon.signals import SIGNALS, measure

Q, K, D, SCALE = 12, 12, 8, 0.7


def call(seed: int = 0, spread: float = 2.0, **kwargs: object) -> tuple[Tensor, Tensor, dict[str, object]]:
    generator = torch.Generator().manual_seed(seed)
    query = torch.randn(2, 4, Q, D, generator=generator) * spread
    key = torch.randn(2, 2, K, D, generator=generator)
    return query, key, {"scale": SCALE, **kwargs}


def rows(
    query: Tensor, key: Tensor, causal: bool, softcap: float | None = None
) -> list[tuple[int, int, int, np.ndarray, np.ndarray]]:
    """(b, h, i, raw scores, logits) of every row over its visible keys, in float64."""
    found = []
    q, k = query.double().numpy(), key.double().numpy()
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            for i in range(Q):
                raw = SCALE * k[b, h // 2, : i + 1 if causal else K] @ q[b, h, i]
                found.append((b, h, i, raw, raw if softcap is None else softcap * np.tanh(raw / softcap)))
    return found


def by_hand(name: str, raw: np.ndarray, z: np.ndarray) -> float:
    """One row's signal from its raw scores and its logits."""
    p = softmax(z)
    jacobian = np.diag(p) - np.outer(p, p)
    formulas = {
        "attention_entropy": lambda: entropy(p),
        "normalized_entropy": lambda: entropy(p) / math.log(len(p)) if len(p) > 1 else 0.0,
        "collision_probability": lambda: (p**2).sum(),
        "effective_keys": lambda: 1 / (p**2).sum(),
        "max_logit": lambda: raw.max(),
        "max_probability": lambda: p.max(),
        "sink_mass": lambda: p[0],
        "precision_bits": lambda: math.log2(np.abs(z).max() / (2 * math.atanh(0.1))),
        "softmax_jacobian_norm": lambda: np.linalg.norm(jacobian),
        "saturated_fraction": lambda: float(min(p.max(), 2 * p.max() * (p.sum() - p.max())) < 1e-3),
    }
    return float(formulas[name]())


ORACLE = [
    "attention_entropy",
    "normalized_entropy",
    "collision_probability",
    "effective_keys",
    "max_logit",
    "max_probability",
    "sink_mass",
    "precision_bits",
    "softmax_jacobian_norm",
    "saturated_fraction",
]


@pytest.mark.parametrize("engine", ["dense", "blockwise", "fused"])
@pytest.mark.parametrize(("causal", "softcap"), [(True, None), (False, None), (True, 3.0)])
@pytest.mark.parametrize("name", ORACLE)
def test_agrees_with_the_oracle(name: str, causal: bool, softcap: float | None, engine: str) -> None:
    query, key, kwargs = call(is_causal=causal, softcap=softcap)
    found = SIGNALS[name].function(attention_operator(query, key, engine=engine, **kwargs))
    for b, h, i, raw, z in rows(query, key, causal, softcap):
        assert float(found[b, h, i]) == pytest.approx(by_hand(name, raw, z), abs=2e-5, rel=2e-5)


def test_the_oracle_list_names_all_but_the_curvatures() -> None:
    assert set(SIGNALS) - set(ORACLE) == {"hnf_log_curvature", "hnf_log_curvature_bound"}


@pytest.mark.parametrize("n", [2, 7, 64])
def test_uniform_rows(n: int) -> None:
    one = operator_of_scores(torch.zeros(1, 1, 1, n))
    assert float(signals.attention_entropy(one)) == pytest.approx(math.log(n), abs=1e-6)
    assert float(signals.normalized_entropy(one)) == pytest.approx(1, abs=1e-6)
    assert float(signals.collision_probability(one)) == pytest.approx(1 / n, rel=1e-6)
    assert float(signals.max_probability(one)) == pytest.approx(1 / n, rel=1e-6)
    # diag(1/n) - 1/n^2: eigenvalue 1/n, n - 1 times
    assert float(signals.softmax_jacobian_norm(one)) == pytest.approx(math.sqrt(n - 1) / n, rel=1e-5)


def test_one_hot_rows() -> None:
    scores = torch.full((1, 1, 1, 9), -500.0)
    scores[..., 4] = 500.0
    one = operator_of_scores(scores)
    assert float(signals.attention_entropy(one)) == 0
    assert float(signals.max_probability(one)) == 1
    assert float(signals.softmax_jacobian_norm(one)) == pytest.approx(0, abs=1e-6)
    assert float(signals.saturated_fraction(one)) == 1
    assert float(signals.precision_bits(one)) == pytest.approx(math.log2(500 / (2 * math.atanh(0.1))))


@pytest.mark.parametrize("name", [name for name in ORACLE if name not in {"max_logit", "precision_bits"}])
def test_a_shift_of_all_scores_changes_nothing(name: str) -> None:
    scores = torch.randn(2, 3, 5, 40, generator=torch.Generator().manual_seed(3)) * 4
    before, after = (SIGNALS[name].function(operator_of_scores(s)) for s in (scores, scores + 7.0))
    torch.testing.assert_close(before, after, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("spread", [0.01, 1.0, 5.0, 50.0])
def test_bounds(spread: float) -> None:
    query, key, kwargs = call(spread=spread, is_causal=True)
    one = attention_operator(query, key, **kwargs)
    n = one.n_visible()
    assert ((signals.attention_entropy(one) >= 0) & (signals.attention_entropy(one) <= n.log() + 1e-6)).all()
    assert ((signals.normalized_entropy(one) >= 0) & (signals.normalized_entropy(one) <= 1 + 1e-6)).all()
    assert (signals.collision_probability(one) <= signals.max_probability(one) + 1e-6).all()
    assert (signals.softmax_jacobian_norm(one) <= math.sqrt(0.5) + 1e-6).all()


@pytest.mark.parametrize("name", list(SIGNALS))
def test_rows_that_see_nothing_are_no_nan_and_count_nowhere(name: str) -> None:
    query, key, kwargs = call()
    mask = torch.ones(2, 1, Q, K, dtype=torch.bool)
    mask[1, :, 5:] = False
    masked = attention_operator(query, key, mask=mask, **kwargs)
    assert not SIGNALS[name].function(masked).isnan().any()
    reduced = measure(masked, [name])[name]
    alone = [
        measure(attention_operator(query[b : b + 1, :, :n], key[b : b + 1], **kwargs), [name])[name] for b, n in ((0, Q), (1, 5))
    ]
    if not name.startswith("hnf_log_curvature_bound"):  # whose query norm is over all the rows given
        torch.testing.assert_close(reduced.value, alone[0].merge(alone[1]).value, equal_nan=True)


@pytest.mark.parametrize("name", [name for name in SIGNALS if name != "saturated_fraction"])
def test_a_score_that_is_nan_shows(name: str) -> None:
    query, key, kwargs = call()
    query[0, 1, 3] = math.nan
    found = SIGNALS[name].function(attention_operator(query, key, **kwargs))
    if name == "hnf_log_curvature_bound":
        assert found[0, 1].isnan().all()
    else:
        assert found[0, 1, 3].isnan()
    assert not found[1].isnan().any()


def test_the_classic_bound_is_the_printed_formula() -> None:
    query, key, kwargs = call(is_causal=True)
    found = signals.hnf_log_curvature_bound(attention_operator(query, key, **kwargs))
    for b, h, i, raw, _ in rows(query, key, True):
        norms = math.log(float(query[b, h].double().norm())) + math.log(float(key[b, h // 2].double().norm()))
        assert float(found[b, h, i]) == pytest.approx(norms - math.log(D) + 2 * np.abs(raw).max(), abs=1e-4)


@pytest.mark.parametrize("spread", [0.1, 1.0, 3.0, 10.0])
def test_no_direction_bends_more_than_the_tight_bound(spread: float) -> None:
    """The second derivative of q, K -> softmax, along 200 random directions a row, stays below twice the bounded curvature."""
    generator = torch.Generator().manual_seed(11)
    query = torch.randn(1, 1, 1, D, generator=generator, dtype=torch.float64) * spread
    key = torch.randn(1, 1, K, D, generator=generator, dtype=torch.float64)
    bound = float(signals.hnf_log_curvature(attention_operator(query, key, scale=D**-0.5, engine="dense")).exp())
    q, k = query[0, 0, 0], key[0, 0]

    def attend(t: Tensor, dq: Tensor, dk: Tensor) -> Tensor:
        return torch.softmax(D**-0.5 * (k + t * dk) @ (q + t * dq), dim=-1)

    worst = 0.0
    for _ in range(200):
        direction = torch.randn(D + K * D, generator=generator, dtype=torch.float64)
        direction /= direction.norm()
        dq, dk = direction[:D], direction[D:].view(K, D)
        zero = torch.zeros((), dtype=torch.float64)
        second = torch.func.jacfwd(torch.func.jacfwd(attend))(zero, dq, dk)
        worst = max(worst, float(second.norm()) / 2)
    assert 0 < worst <= bound


@pytest.mark.parametrize("seed", range(20))
def test_the_eigenvalue_bound_holds_and_is_near(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    z = torch.randn(1, 1, 1, 30, generator=generator, dtype=torch.float64) * (0.3 + seed)
    p = torch.softmax(z[0, 0, 0], -1)
    true = float(torch.linalg.eigvalsh(torch.diag(p) - torch.outer(p, p)).max())
    bound = float(signals.curvature._log_jacobian_eigenvalue(operator_of_scores(z, engine="dense")).exp())
    assert true <= bound * (1 + 1e-9) <= 2 * true * (1 + 1e-6)


@pytest.mark.parametrize("gap", [5.0, 20.0, 60.0, 100.0])
def test_saturated_rows_keep_their_digits_in_float32(gap: float) -> None:
    scores = torch.tensor([[[[gap, 0.0, 0.0]]]])
    found = float(operator_of_scores(scores, engine="blockwise").log_odds_of_rest())
    assert found == pytest.approx(math.log(2) - gap, rel=1e-5)


def test_precision_bits_bound_the_move_of_the_softmax() -> None:
    generator = np.random.default_rng(0)
    for _ in range(200):
        z = generator.normal(size=20) * 10 ** generator.uniform(-1, 2)
        bits = float(signals.precision_bits(operator_of_scores(torch.tensor(z).view(1, 1, 1, -1), engine="dense")))
        eta = np.abs(z).max() * 2.0**-bits
        moved = softmax(z + eta * generator.choice([-1, 1], size=20))
        assert np.abs(moved - softmax(z)).sum() / 2 <= 0.1 + 1e-9


def test_log_partition_powers_are_cumulants() -> None:
    query, key, kwargs = call()
    one = attention_operator(query, key, **kwargs)
    for b, h, i, _, z in rows(query, key, False):
        for power in (1, 2, 3):
            assert float(one.log_partition(power)[b, h, i]) == pytest.approx(logsumexp(power * z), rel=1e-5)
