"""A controlled model is watched like any other, and what is seen is the modified attention."""

from typing import Any

import numpy as np
import pytest
import torch

import stabmon
from stabmon.controllers import attach_controllers
from tests.controllers.test_families import CASES
from tests.support.controlled_attention import built, dense_output, output_of, scatter
from tests.support.small_runs import (
    batches,
    clean,
    gpt2,
    llama,
    optimizer_of,
    same_bits,
    train,
    weights,
)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["llama-sdpa", "mistral-sdpa"])
@torch.no_grad()
def test_signals_are_those_of_the_modified_attention(family: str, case: str) -> None:
    kind, options = CASES[case]
    model, inputs, _ = built(family, kind, **options)
    seen: list[torch.Tensor] = []
    dense_output(model, inputs, seen)
    with stabmon.AttentionAnalyzer(
        model, signals=["attention_entropy", "max_probability", "sink_mass"]
    ) as analyzer:
        output_of(model, inputs)
    stats = analyzer.diagnose().stats
    assert len(stats) == len(seen) == 2
    for layer, p in zip(stats.values(), seen, strict=True):
        entropy = torch.special.entr(p).sum(-1).mean(dim=(0, 2))
        np.testing.assert_allclose(layer["attention_entropy"], entropy, atol=1e-4)
        np.testing.assert_allclose(layer["max_probability"], p.amax(-1).mean(dim=(0, 2)), atol=1e-4)
        np.testing.assert_allclose(layer["sink_mass"], p[..., 0].mean(dim=(0, 2)), atol=1e-4)
    assert clean_but_for_controllers(model)


def clean_but_for_controllers(model: Any) -> bool:
    from stabmon.controllers import detach_controllers

    detach_controllers(model)
    return clean(model)


@torch.no_grad()
def test_a_softcapped_model_is_seen_with_its_bias_within_the_cap() -> None:
    model, inputs, _ = built("gemma2-eager", form="both")
    seen: list[torch.Tensor] = []
    dense_output(model, inputs, seen)
    with stabmon.AttentionAnalyzer(model, signals=["attention_entropy"]) as analyzer:
        output_of(model, inputs)
    for layer, p in zip(analyzer.diagnose().stats.values(), seen, strict=True):
        np.testing.assert_allclose(
            layer["attention_entropy"], torch.special.entr(p).sum(-1).mean(dim=(0, 2)), atol=1e-4
        )


@pytest.mark.parametrize(
    ("make", "case"),
    [(gpt2, "both"), (gpt2, "linearization"), (llama, "both"), (llama, "learned_ramp")],
)
def test_watching_changes_not_a_bit_of_training(make: Any, case: str) -> None:
    kind, options = CASES[case]
    found = []
    for watched in (False, True):
        model = make()
        scatter(attach_controllers(model, kind, **options))
        optimizer = optimizer_of(model)
        monitor = (
            stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[])
            if watched
            else None
        )
        given = train(model, monitor, optimizer, batches(4))
        if monitor is not None:
            assert not monitor.errors
            assert all(diagnosis is not None and len(diagnosis.stats) == 2 for diagnosis in given)
            monitor.close()
        found.append(weights(model))
    assert same_bits(*found)


def test_a_clip_of_queries_and_keys_fits_a_controlled_model() -> None:
    from stabmon.capture import AttentionCapture
    from stabmon.projections.locate import find_query_key
    from stabmon.signals.accumulator import Measurements

    model, inputs, _ = built("llama-sdpa", form="both")
    measured = Measurements(["max_logit"])
    with AttentionCapture(model, measured.add):
        output_of(model, inputs)
    for layer, info in measured.info.items():
        assert (info.heads, info.head_dim) == (4, 8)
        assert find_query_key(measured.modules[layer], info)
