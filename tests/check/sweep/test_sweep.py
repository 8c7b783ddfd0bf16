"""The sweep over learning rates: its fit on made data, and a real one."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from stabmon.check.judging.judge_rate import judge_rate
from stabmon.check.measuring.short_run import train_briefly
from stabmon.check.sweep.proxy import narrow
from stabmon.check.sweep.sweep import Sweep, fit_limit, score_limit, sweep_rates
from stabmon.tiny.recipe import Recipe
from tests.support import check_models as models
from tests.support.small_runs import clean


def batches(steps: int, seed: int) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randint(0, 32, (steps, 4, 16), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def test_a_power_law_is_found_with_its_crossing_and_its_uncertainty() -> None:
    generator = np.random.default_rng(0)
    rates = np.geomspace(2e-3, 5e-2, 9)
    covered = 0
    for _ in range(200):
        scores = 60.0 * (rates / 0.01) ** 1.5 * np.exp(generator.normal(0, 0.3, 9))
        limit, low, high, exponent = fit_limit(rates.tolist(), scores.tolist(), 60.0)
        assert limit is not None
        assert low is not None
        assert high is not None
        assert exponent == pytest.approx(1.5, abs=0.6)
        covered += low <= 0.01 <= high
    assert covered >= 0.9 * 200


def test_scores_that_never_come_to_the_limit_have_none() -> None:
    assert fit_limit([1e-3, 1e-2, 1e-1], [1.0, 2.0, 4.0], 60.0) == (None, None, None, None)


def test_a_run_that_broke_down_counts_as_beyond_the_limit() -> None:
    limit, low, high, _ = fit_limit([1e-3, 1e-2, 1e-1], [1.0, 5.0, math.inf], 60.0)
    assert (limit, low, high) == (1e-1, None, 1e-1)


def test_at_the_score_limit_a_typical_normal_row_passes_a_tenth() -> None:
    rows = np.random.default_rng(0).normal(size=(4000, 64))
    rows *= score_limit(64) / math.sqrt(2 * math.log(64))
    top = np.sort(rows, axis=1)[:, -2:]
    passed = 2 * np.exp(-(top[:, 1] - top[:, 0]))
    assert 0.3 < float((passed < 0.1).mean()) < 0.8


def test_a_sweep_brackets_the_limit_in_a_real_model() -> None:
    heard = []
    found = sweep_rates(
        lambda seed: models.tiny(), batches, Recipe(), "fp32", 16, around=2e-2, on_run=heard.append
    )
    assert len(heard) == len(found.rates)
    assert found.limit is not None
    assert min(found.rates) < found.limit < max(found.rates)
    assert found.low is not None
    assert found.low < found.limit < found.high  # type: ignore[operator]
    assert found.exponent is not None
    assert found.exponent > 0.5


def test_short_runs_are_the_same_each_time_and_leave_nothing() -> None:
    state = torch.get_rng_state()
    model = models.gpt2(attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0)
    runs = [
        train_briefly(
            models.gpt2 if n else lambda: model, batches(6, 0), Recipe(warmup=2), 1e-3, "bf16"
        )
        for n in (0, 1)
    ]
    assert np.isfinite(runs[0].scores).all()
    assert len(runs[0].losses) == 6
    assert clean(model)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("config", ["gpt2", "llama", "qwen3"])
def test_the_narrow_proxy_keeps_the_spread_of_scores(config: str) -> None:
    wide = getattr(models, config)(
        **({"n_embd": 512} if config == "gpt2" else {"hidden_size": 512})
    ).config
    small, width, full = narrow(wide)
    assert (width, full) == (128, 512)
    assert small.initializer_range**2 * width == pytest.approx(wide.initializer_range**2 * full)
    assert small.num_attention_heads == 4


def sweep(limit: float | None) -> Sweep:
    ends = (None, None) if limit is None else (limit / 2, limit * 2)
    return Sweep((1e-3,), (1.0,), (0.0,), (3.0,), 60.0, limit, *ends, 1.5, 48, 128, 512)


@pytest.mark.parametrize(
    ("rate", "severity"), [(1e-4, None), (1.5e-3, None), (3e-3, "warning"), (1e-2, "error")]
)
def test_a_rate_is_judged_against_the_interval_at_full_width(
    rate: float, severity: str | None
) -> None:
    found = judge_rate(sweep(1.6e-2), rate)  # 2e-3 … 8e-3 at full width
    assert (None if found is None else found.severity) == severity


def test_without_a_limit_or_a_rate_nothing_is_found() -> None:
    assert judge_rate(sweep(None), 1.0) is None
    assert judge_rate(sweep(1e-2), None) is None


@pytest.mark.parametrize("text", ["fast", "cosine:x", "cosine:1:2:3", ""])
def test_an_unknown_schedule_says_what_there_is(text: str) -> None:
    with pytest.raises(ValueError, match="use constant, linear, cosine"):
        Recipe.parse(text)


def test_schedules_warm_up_and_fall_to_a_tenth() -> None:
    for name, end in (("constant", 1.0), ("linear", 0.1), ("cosine", 0.1)):
        recipe = Recipe.parse(f"{name}:10:110")
        assert recipe.rate_at(0, 1.0) == pytest.approx(0.1)
        assert recipe.rate_at(9, 1.0) == recipe.rate_at(10, 1.0) == 1.0
        assert recipe.rate_at(110, 1.0) == pytest.approx(end)
