"""Perplexity against cache size is the loss of a full forward in which the evicted keys are
missing.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from stabmon.analysis.kv_cache import perplexity_by_cache_size, simulate_cake
from stabmon.analysis.kv_cache.cache.decode import log_probability
from stabmon.analysis.kv_cache.prefill import Prefill
from stabmon.analysis.record import load_record, save_record
from tests.support.cache_models import compressed, gemma3, llama, masked_forward, tokens

CONTEXT, NEW, WINDOW = 40, 9, 6
POLICIES = ["cake", "snapkv", "h2o", "recency", "random", "ada_snapkv"]


@pytest.mark.parametrize(("chunk", "policies"), [(1, ["cake"]), (4, ["snapkv"]), (64, POLICIES)])
def test_losses_equal_a_masked_forward(chunk: int, policies: list[str]) -> None:
    model, ids = llama(), tokens(3, CONTEXT + NEW)
    table = perplexity_by_cache_size(
        model,
        ids[:, :CONTEXT],
        ids[:, CONTEXT:],
        sizes=[12, 0.5],
        policies=policies,
        window_size=WINDOW,
        chunk=chunk,
        batch_size=2,
    )
    for row, policy in enumerate(policies):
        for column, size in enumerate((12, 0.5)):
            for part in (slice(0, 2), slice(2, 3)):  # as the batches were: random draws for a batch
                kept = compressed(
                    model, ids[part], CONTEXT, policy=policy, cache_size=size, window_size=WINDOW
                ).kept()
                logits = masked_forward(model, ids[part], kept, CONTEXT)[:, CONTEXT - 1 : -1]
                expected = -log_probability(logits, ids[part, CONTEXT:]).mean(1)
                assert np.abs(table.nats[row, column, part] - expected.numpy()).max() < 1e-4
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits[:, CONTEXT - 1 : -1]
    assert (
        np.abs(table.full + log_probability(logits, ids[:, CONTEXT:]).mean(1).numpy()).max() < 1e-4
    )
    assert np.abs(table.cost[:, 0]).max() > 0.01, "what is evicted must show"
    assert table.kept[:, 0] == pytest.approx(12 / CONTEXT, abs=2 / CONTEXT)


@pytest.mark.parametrize("maker", [llama, gemma3])
def test_a_prefill_gives_the_caches_of_a_real_prompt(maker: object) -> None:
    model, ids = maker(), tokens(2, CONTEXT)  # type: ignore[operator]
    mask = torch.ones_like(ids)
    mask[0, :7] = 0
    start = Prefill.of(model, ids, mask, WINDOW)
    for policy in ("cake", "h2o", "random"):
        made = start.compressed(policy, 14)
        real = compressed(
            model, ids, CONTEXT, mask, policy=policy, cache_size=14, window_size=WINDOW
        )
        for name, held in real.kept().items():
            assert torch.equal(made.kept()[name], held)
        for index, layer in real.layers.items():
            torch.testing.assert_close(made.layers[index].keys, layer.keys)
            torch.testing.assert_close(made.layers[index].values, layer.values)


def test_table_is_stored_with_a_report(tmp_path: Path) -> None:
    model, ids = llama(), tokens(2, CONTEXT + NEW)
    table = perplexity_by_cache_size(
        model,
        ids[:, :CONTEXT],
        ids[:, CONTEXT:],
        sizes=[12],
        policies=["cake", "recency"],
        window_size=WINDOW,
    )
    report = simulate_cake(
        model, ids[:, :CONTEXT], cache_size=12, window_size=WINDOW, continuation=ids[:, CONTEXT:]
    )
    save_record(report.to_record(table), tmp_path)
    record = load_record(tmp_path, "cake")
    assert record.values["perplexity_policies"] == ["cake", "recency"]
    assert np.array_equal(record.arrays["perplexity_nats"], table.nats)
    assert record.values["full_perplexity"] == pytest.approx(
        float(np.exp(table.full.mean())), rel=1e-4
    )
    assert table.to_markdown().count("\n") == 3
