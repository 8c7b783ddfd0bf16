"""The eight numbers against sums over eager maps, and batches that are run in parts."""

from __future__ import annotations

import logging
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from stabmon.analysis.attribution.summary import (
    MEASURED,
    aggregate_attribution,
    compute_attention_attribution,
)
from stabmon.analysis.chunks import in_chunks, part_of
from stabmon.analysis.rollout.api import attention_rollout
from tests.support import rollout_models as models


@pytest.mark.parametrize("make", [models.llama, models.bert, models.gpt2, models.vit, models.t5])
@pytest.mark.parametrize("layer_idx", [-1, 0])
def test_eight_numbers(make: Any, layer_idx: int) -> None:
    case = make()
    with torch.no_grad():
        maps = models.maps_of(case)
    found = compute_attention_attribution(case.model, case.batch, layer_idx)
    rows = maps[layer_idx].transpose(1, 2)[case.valid]
    rolled = models.dense_rollout(maps)[case.valid]
    dense = {
        "mean_attention": rows.mean(),
        "max_attention": rows.amax(),
        "attention_entropy": torch.special.entr(rows).sum(-1).mean(),
        "attention_concentration": rows.amax(-1).mean(),
        "rollout_max": rolled.amax(),
        "rollout_entropy": torch.special.entr(rolled).sum(-1).mean(),
    }
    assert list(found) == [*MEASURED, "batch_size", "seq_length"]
    for name, value in dense.items():
        assert found[name] == pytest.approx(float(value), abs=1e-5), name
    assert found["mean_attention"] == pytest.approx(1 / rows.shape[-1], abs=1e-6)
    assert (found["batch_size"], found["seq_length"]) == tuple(case.valid.shape)
    assert isinstance(found["batch_size"], int)


def test_layer_and_pattern_are_checked() -> None:
    case = models.llama()
    with pytest.raises(
        ValueError, match=r"layer_idx 3: there are 3 layers, 0 to 2: model\.layers\.0"
    ):
        compute_attention_attribution(case.model, case.batch, 3)
    with pytest.raises(ValueError, match="matches none of the layers"):
        compute_attention_attribution(case.model, case.batch, attention_layer_pattern="mixer")
    only = compute_attention_attribution(case.model, case.batch, attention_layer_pattern=r"\.1\.")
    assert (
        only["attention_entropy"]
        == compute_attention_attribution(case.model, case.batch, 1)["attention_entropy"]
    )


def test_nan_where_the_model_is_nan() -> None:
    case = models.bert()
    with torch.no_grad():
        next(case.model.parameters())[int(case.batch["input_ids"][0, 0])] = torch.nan
    found = compute_attention_attribution(case.model, case.batch)
    assert all(math.isnan(found[name]) for name in MEASURED)


class Limited(nn.Module):
    """Runs out of memory above a number of samples."""

    def __init__(self, model: nn.Module, most: int, error: Exception) -> None:
        super().__init__()
        self.model, self.most, self.error = model, most, error
        self.sizes: list[int] = []

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Any:
        self.sizes.append(len(input_ids))
        if len(input_ids) > self.most:
            raise self.error
        return self.model(input_ids=input_ids, attention_mask=attention_mask)


ERRORS = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
    RuntimeError(
        "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 99 bytes"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_halves_where_memory_runs_out_with_the_same_numbers(
    error: Exception, caplog: pytest.LogCaptureFixture
) -> None:
    base = models.gpt2().model
    mask = models.padded(11, 7, left=True)
    mask[5, :6] = 0
    batch = {"input_ids": models.ids(7), "attention_mask": mask}
    with caplog.at_level(logging.WARNING, "stabmon"):
        limited = Limited(base, 2, error)
        parted = attention_rollout(
            limited, batch, targets=[[n] for n in range(4, 11)] if error is ERRORS[0] else None
        )
    whole = attention_rollout(
        Limited(base, 99, error),
        batch,
        targets=[[n] for n in range(4, 11)] if error is ERRORS[0] else None,
    )
    assert limited.sizes == [7, 4, 2, 2, 2, 1]
    told = [record.message for record in caplog.records if "memory" in record.message]
    assert told == ["stabmon: memory ran out with 7 samples at once: continuing with 4 of 7"]
    for name in ("matrix", "first_token_share", "valid", "targets"):
        one, other = getattr(parted, name), getattr(whole, name)
        assert (one is None and other is None) or torch.equal(one, other), name
    numbers = [compute_attention_attribution(Limited(base, most, error), batch) for most in (2, 99)]
    assert numbers[0] == numbers[1]


def test_same_numbers_on_several_threads() -> None:
    """Five tokens a sample: as few rows as make threads share a product out otherwise."""
    batch = {"input_ids": models.ids(8, 5), "attention_mask": torch.ones(8, 5, dtype=torch.int64)}
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        for make in (models.gpt2, models.bert):
            base = make().model
            whole, parted = (
                attention_rollout(Limited(base, most, MemoryError()), batch).matrix
                for most in (8, 1)
            )
            assert torch.equal(whole, parted)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


def test_what_is_no_lack_of_memory_is_raised() -> None:
    batch = {"input_ids": models.ids(2), "attention_mask": models.padded(11, 2)}
    with pytest.raises(RuntimeError, match="shape mismatch"):
        attention_rollout(Limited(models.gpt2().model, 1, RuntimeError("shape mismatch")), batch)
    with pytest.raises(MemoryError):
        attention_rollout(Limited(models.gpt2().model, 0, MemoryError()), batch)
    with pytest.raises(ValueError, match="chunk_size 0"):
        attention_rollout(models.gpt2().model, batch, chunk_size=0)


def test_parts_of_batches() -> None:
    batch = {"input_ids": torch.zeros(4, 3), "position_ids": torch.zeros(1, 3), "flag": True}
    part = part_of(batch, 1, 3)
    assert (part["input_ids"].shape, part["position_ids"].shape, part["flag"]) == (
        (2, 3),
        (1, 3),
        True,
    )
    assert part_of((torch.zeros(5, 4, 2), torch.zeros(4, 5)), 0, 2, dim=1)[0].shape == (5, 2, 2)
    assert in_chunks(
        torch.arange(5.0)[:, None], lambda part, start: part + start, torch.cat, 2
    ).flatten().tolist() == [
        0,
        1,
        4,
        5,
        8,
    ]


def test_seq_first_batches_are_parted_by_sample() -> None:
    torch.manual_seed(0)
    model = nn.Transformer(16, 2, 1, 1, 16)
    parts = torch.randn(5, 4, 16), torch.randn(3, 4, 16)
    whole, parted = (
        attention_rollout(model, parts, stack="joined", chunk_size=size) for size in (None, 1)
    )
    torch.testing.assert_close(whole.matrix, parted.matrix, atol=1e-6, rtol=0)


def test_summary_over_a_loader() -> None:
    case = models.gpt2()
    batches = [
        {
            "input_ids": models.ids(n, 11, seed=n),
            "attention_mask": torch.ones(n, 11, dtype=torch.int64),
        }
        for n in (1, 3, 2)
    ]
    summary = aggregate_attribution(case.model, batches)
    single = [compute_attention_attribution(case.model, batch) for batch in batches]
    assert (summary.n, list(summary.batches)) == (6, single)
    values = np.array([each["attention_entropy"] for each in single])
    assert summary.mean["attention_entropy"] == pytest.approx(float(values @ [1, 3, 2]) / 6)
    assert summary.std["attention_entropy"] == pytest.approx(float(values.std(ddof=1)))
    assert summary.quantiles["attention_entropy"][0.5] == pytest.approx(float(np.median(values)))
    assert aggregate_attribution(case.model, iter(batches), max_batches=1).n == 1
    with pytest.raises(ValueError, match="no batch"):
        aggregate_attribution(case.model, [])
