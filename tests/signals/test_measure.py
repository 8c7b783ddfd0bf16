"""From rows to one number a head: what counts, how it is reduced, merged and sampled."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from stabmon.operator import AttentionOperator, attention_operator, operator_of_scores
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall
from stabmon.signals import SIGNALS, measure, normalized_entropy
from stabmon.signals.base import Signal, signal
from tests.support.signal_rows import random_call

MEANS = {
    "attention_entropy",
    "normalized_entropy",
    "max_probability",
    "collision_probability",
    "sink_mass",
    "effective_keys",
    "saturated_fraction",
}
MAXIMA = {
    "max_logit",
    "softmax_jacobian_norm",
    "hnf_log_curvature",
    "hnf_log_curvature_bound",
    "precision_bits",
}


def call(batch: int = 2, queries: int = 40, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, 4, queries, 8, generator=generator) * 3, torch.randn(
        batch, 2, queries, 8, generator=generator
    )


def causal(
    query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None = None
) -> AttentionOperator:
    return attention_operator(query, key, scale=0.35, is_causal=True, mask=mask)


def test_each_signal_has_the_reduction_that_the_records_promise() -> None:
    assert {
        name
        for name, each in SIGNALS.items()
        if each.reduction == "mean" and name in MEANS | MAXIMA
    } == MEANS
    assert {
        name for name, each in SIGNALS.items() if each.reduction == "max" and name in MEANS | MAXIMA
    } == MAXIMA


@pytest.mark.parametrize("name", list(SIGNALS))
def test_a_heads_value_is_the_mean_or_maximum_over_its_counted_rows(name: str) -> None:
    operator, _, _, _ = random_call()
    rows = SIGNALS[name].function(operator).double()
    counted = operator.n_visible() >= SIGNALS[name].least_visible
    assert counted.any()
    assert not counted.all()
    wanted = [
        rows[:, h][counted[:, h]].mean()
        if SIGNALS[name].reduction == "mean"
        else rows[:, h][counted[:, h]].max()
        for h in range(4)
    ]
    np.testing.assert_allclose(
        measure(operator, [name])[name].value.numpy(), np.array(wanted), rtol=1e-6
    )


def test_only_normalized_entropy_leaves_out_rows_that_see_few_keys_of_many() -> None:
    floors = {name: SIGNALS[name].least_visible for name in MEANS | MAXIMA}
    assert {name: floor for name, floor in floors.items() if floor > 1} == {
        "normalized_entropy": 16,
        "saturated_fraction": 2,
    }


@pytest.mark.parametrize(("length", "window", "least"), [(8, None, 4), (15, None, 8), (40, 4, 2)])
def test_where_no_row_sees_sixteen_keys_those_count_that_see_half_of_the_most(
    length: int, window: int | None, least: int
) -> None:
    query, key = (each[:, :, :length] for each in call())
    operator = attention_operator(query, key, scale=0.5, is_causal=True, window=window)
    rows, counted = normalized_entropy(operator).double(), operator.n_visible() >= least
    wanted = [rows[:, h][counted[:, h]].mean() for h in range(rows.shape[1])]
    found = measure(operator, ["normalized_entropy"])["normalized_entropy"].value
    np.testing.assert_allclose(found.numpy(), np.array(wanted), rtol=1e-6)


def test_rows_of_one_key_have_no_normalized_entropy() -> None:
    query, key = call()
    operator = attention_operator(query, key, scale=0.5, is_causal=True, window=1)
    assert bool(measure(operator, ["normalized_entropy"])["normalized_entropy"].value.isnan().all())


@pytest.mark.parametrize("name", list(SIGNALS))
def test_micro_batches_merge_to_what_one_batch_gives(name: str) -> None:
    query, key = call(batch=5)
    mask = torch.ones(5, 1, 1, 40, dtype=torch.bool)
    for element, left in enumerate((0, 3, 11, 30, 39)):
        mask[element, ..., :left] = False
    whole = measure(causal(query, key, mask), [name])[name]
    parts = [
        measure(causal(query[s], key[s], mask[s]), [name])[name]
        for s in (slice(0, 1), slice(1, 4), slice(4, 5))
    ]
    merged = parts[0].merge(parts[1]).merge(parts[2])
    torch.testing.assert_close(merged.value, whole.value, rtol=1e-6, atol=1e-9, check_dtype=False)
    assert torch.equal(merged.count, whole.count)


def test_a_micro_batch_without_a_counted_row_changes_nothing() -> None:
    query, key = call()
    full = measure(causal(query, key), list(SIGNALS))
    nothing = measure(causal(query, key, torch.zeros(1, 1, 1, 40, dtype=torch.bool)), list(SIGNALS))
    for name in SIGNALS:
        assert nothing[name].value.isnan().all()
        for merged in (full[name].merge(nothing[name]), nothing[name].merge(full[name])):
            torch.testing.assert_close(merged.value, full[name].value, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["max_logit", "attention_entropy"])
def test_a_nan_row_shows_in_its_heads_value_and_in_no_other(name: str) -> None:
    scores = torch.randn(2, 3, 5, 20, generator=torch.Generator().manual_seed(0))
    scores[1, 2, 4, 0] = math.nan
    value = measure(operator_of_scores(scores), [name])[name].value
    assert value.isnan().tolist() == [False, False, True]
    assert (
        measure(operator_of_scores(scores[:1]), [name])[name]
        .merge(measure(operator_of_scores(scores[1:]), [name])[name])
        .value[2]
        .isnan()
    )


def test_sampled_rows_leave_maxima_exact() -> None:
    query, key = call(queries=200)
    exact, sampled = (
        measure(causal(query, key), list(SIGNALS), sample_rows=rows) for rows in (None, 16)
    )
    for name in MAXIMA:
        torch.testing.assert_close(sampled[name].value, exact[name].value, rtol=1e-6, atol=1e-6)
        assert torch.equal(sampled[name].count, exact[name].count)


def test_sampled_means_are_unbiased_and_close() -> None:
    """Over many draws the error's mean is within four of its standard errors; one draw is within
    four standard deviations.
    """
    query, key = call(queries=150)
    generator = torch.Generator().manual_seed(7)
    exact = measure(causal(query, key), ["attention_entropy"])["attention_entropy"].value
    draws = torch.stack(
        [
            measure(causal(query, key), ["attention_entropy"], sample_rows=32, generator=generator)[
                "attention_entropy"
            ].value
            for _ in range(80)
        ]
    )
    error = draws.mean(0) - exact
    assert (draws.std(0) > 0).all()
    assert (error.abs() <= 4 * draws.std(0) / math.sqrt(80)).all()
    assert (draws - exact).abs().max() < 0.25 * exact.min()


def test_sampled_rows_cover_every_stretch_of_positions() -> None:
    """Mean of the position itself, through rows that see i + 1 keys alike: entropy ln(i + 1)."""
    queries = 1000
    operator = attention_operator(
        torch.zeros(1, 1, queries, 2), torch.zeros(1, 1, queries, 2), scale=1.0, is_causal=True
    )
    sampled = measure(operator, ["attention_entropy"], sample_rows=50)[
        "attention_entropy"
    ].value.item()
    exact = np.log(np.arange(1, queries + 1)).mean()
    assert sampled == pytest.approx(exact, abs=0.03)


def test_the_draw_is_the_generators_and_leaves_the_global_one_alone() -> None:
    query, key = call(queries=100)
    before = torch.get_rng_state()

    def draw(seed: int | None) -> torch.Tensor:
        generator = None if seed is None else torch.Generator().manual_seed(seed)
        return measure(
            causal(query, key), ["attention_entropy"], sample_rows=10, generator=generator
        )["attention_entropy"].value

    assert torch.equal(draw(1), draw(1))
    assert torch.equal(draw(None), draw(None))
    assert not torch.equal(draw(1), draw(2))
    assert torch.equal(torch.get_rng_state(), before)


def test_asking_for_more_rows_than_there_are_takes_all() -> None:
    query, key = call()
    exact, sampled = (
        measure(causal(query, key), ["sink_mass"], sample_rows=rows)["sink_mass"]
        for rows in (None, 40)
    )
    assert torch.equal(exact.value, sampled.value)
    assert torch.equal(exact.count, sampled.count)


def test_sampled_sink_mass_looks_at_the_same_key_as_all_rows_do() -> None:
    """A window given as a mask hides the first key from all but the first rows."""
    queries = 64
    ahead = torch.arange(queries)[None] - torch.arange(queries)[:, None]
    mask = ((ahead <= 0) & (ahead > -4))[None, None]
    query, key = call(queries=queries)
    operator = attention_operator(query, key, scale=0.35, mask=mask)
    late = torch.arange(40, 50)
    assert SIGNALS["sink_mass"].function(operator.rows(late)).count_nonzero() == 0


def test_unknown_names_and_rows_are_refused() -> None:
    operator = causal(*call())
    with pytest.raises(ValueError, match="unknown signal 'max_logits', did you mean 'max_logit'"):
        measure(operator, ["max_logits"])
    with pytest.raises(ValueError, match="sample_rows 0: give at least 1"):
        measure(operator, ["sink_mass"], sample_rows=0)


def test_a_captured_call_becomes_its_operator() -> None:
    query, key = call()
    captured = AttentionCall(
        "layer", query, key, 0.35, is_causal=True, window=7, softcap=3.0, sinks=torch.zeros(4)
    )
    direct = attention_operator(
        query, key, scale=0.35, is_causal=True, window=7, softcap=3.0, sinks=torch.zeros(4)
    )
    assert torch.equal(operator_of(captured).entropy(), direct.entropy())
    scores = torch.randn(1, 2, 3, 4)
    given = AttentionCall("layer", None, None, 1.0, scores=scores)
    assert torch.equal(operator_of(given).entropy(), operator_of_scores(scores).entropy())
    with pytest.raises(ValueError, match="the call of layer holds neither"):
        operator_of(AttentionCall("layer", None, None, 1.0))


def test_a_signal_must_name_statistics_that_operators_give() -> None:
    with pytest.raises(
        ValueError, match=r"unknown statistic 'skewness'\. Known: collision, entropy"
    ):
        signal(unit="1", reduction="mean", needs=("skewness",))


def test_a_signal_computes_nothing_beyond_the_needs_it_declares() -> None:
    """Else every signal would cost a pass of its own."""

    class OnlyWhatWasPrepared(Exception):
        pass

    for name in SIGNALS:
        each: Signal = SIGNALS[name]
        operator, _, _, _ = random_call()
        operator.prepare(each.needs)

        def refuse(statistics: object, name: str = name) -> dict[str, torch.Tensor]:
            raise OnlyWhatWasPrepared(f"{name} asked for {statistics} without declaring it")

        operator._compute = refuse  # type: ignore[method-assign]
        each.function(operator)
