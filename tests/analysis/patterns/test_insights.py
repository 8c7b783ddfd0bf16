"""Insights about heads whose attention is known, and maps against dense ones."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from stabmon.analysis.patterns.api import attention_patterns
from stabmon.analysis.patterns.insights import Insight
from stabmon.analysis.patterns.maps import attention_maps

LENGTH = 64
PLACES = torch.arange(LENGTH)
BACK = PLACES[:, None] - PLACES


class ByPlace(nn.Module):
    """Causal attention by given scores of positions, ``[H, 64, 64]``."""

    def __init__(self, scores: Tensor) -> None:
        super().__init__()
        self.scores = scores

    def forward(self, x: Tensor) -> Tensor:
        length = x.shape[1]
        keys = torch.eye(length).expand(len(x), len(self.scores), -1, -1)
        query = self.scores[:, :length, :length].expand(len(x), -1, -1, -1)
        return nn.functional.scaled_dot_product_attention(
            query, keys, keys, scale=1.0, is_causal=True
        )


class Model(nn.Module):
    """Two layers, the second a copy of the first or another."""

    def __init__(self, first: Tensor, second: Tensor) -> None:
        super().__init__()
        self.first, self.second = ByPlace(first), ByPlace(second)

    def forward(self, x: Tensor) -> Tensor:
        self.first(x)
        return self.second(x)


def heads() -> dict[str, Tensor]:
    """Scores by the insight that the head must give."""
    runs = torch.zeros(LENGTH, LENGTH)
    runs[:, 5:13] = 8.0
    first = torch.zeros(LENGTH, LENGTH)
    first[:, 0] = 8.0
    scattered = torch.zeros(LENGTH, LENGTH)
    scattered[:, [2, 9]] = 8.0
    return {
        "recency": -0.15 * BACK.clamp(min=0).float(),
        "uniform": torch.zeros(LENGTH, LENGTH),
        "sinks": first,
        "clustered": runs,
        "sparse": scattered,
    }


def insights(model: nn.Module, rows: int = 2, length: int = LENGTH) -> dict[str, Insight]:
    found = attention_patterns(model, torch.randn(rows, length, 4), advice=False)
    return {insight.kind: insight for insight in found.insights}


def test_each_insight_names_the_heads_that_give_it() -> None:
    scores = heads()
    order = list(scores)
    stack = torch.stack([scores[name] for name in order])
    found = insights(Model(stack, stack.flip(0)))
    expected = {
        "recency": {"recency"},
        "uniform": {"uniform"},
        "sinks": {"sinks"},
        "sparse": {"sinks", "sparse"},
    }
    for kind, names in expected.items():
        where = {
            order[head if layer == "first" else len(order) - 1 - head]
            for layer, head, _ in found[kind].numbers["where"]
        }
        assert where == names, kind
        assert found[kind].numbers["heads"] == 2 * len(names)
        assert found[kind].n == 2 * (LENGTH - 2)
        assert f"{2 * len(names)} of 10 heads" in found[kind].text
    clustered = {
        order[h] for layer, h, _ in found["clustered"].numbers["where"] if layer == "first"
    }
    assert "clustered" in clustered
    assert not clustered & {"sparse", "sinks", "uniform"}
    assert found["redundant_layers"].numbers["pairs"][0][:2] == ["first", "second"]
    assert found["redundant_layers"].numbers["largest"] == pytest.approx(1, abs=1e-6)


def test_numbers_of_an_insight_are_those_of_the_head() -> None:
    scores = heads()["recency"][None]
    found = insights(Model(scores, heads()["uniform"][None]), rows=1)
    assert "redundant_layers" not in found
    p = (scores[0].masked_fill(BACK < 0, -torch.inf)).double().softmax(-1).numpy()
    recent = distant = 0.0
    for i in range(2, LENGTH):
        quarter = max(1, i // 4)
        recent += p[i, i - quarter : i].mean()
        distant += p[i, :quarter].mean()
    value = found["recency"].numbers["where"][0][2]
    assert value == pytest.approx(recent / (recent + distant), abs=1e-6)
    assert f"{value:.0%}" in found["recency"].text


def test_nothing_is_said_where_there_is_too_little_text() -> None:
    stack = torch.stack(list(heads().values()))
    assert not insights(Model(stack, stack), rows=1, length=20)
    assert not insights(Model(stack, stack), rows=4, length=12)


def test_maps_are_exact_up_to_a_size_and_the_largest_of_blocks_beyond() -> None:
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64}
    model = GPT2LMHeadModel(GPT2Config(**sizes, attn_implementation="eager")).eval()
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight.mul_(20)
        ids = torch.randint(0, 50, (2, 50))
        dense = [w[1].numpy() for w in model(ids, output_attentions=True).attentions]
    exact = attention_maps(model, {"input_ids": ids}, sample=1)
    pooled = attention_maps(model, {"input_ids": ids}, sample=-1, max_size=16, heads=[1])
    for layer, weights in zip(exact.maps, dense, strict=True):
        np.testing.assert_allclose(exact.maps[layer], weights, atol=1e-6)
        assert exact.factors[layer] == (1, 1)
        assert pooled.factors[layer] == (4, 4)
        blocks = np.pad(weights[1], (0, 2)).reshape(13, 4, 13, 4).max((1, 3))
        np.testing.assert_allclose(pooled.maps[layer][0], blocks, atol=1e-6)
    record = pooled.to_record()
    assert (record.kind, record.values["pooling"][layer]) == ("heatmap", [4, 4])
    assert record.values["sizes"][layer] == [50, 50]
    for options, message in (
        ({"sample": 2}, "sample 2"),
        ({"heads": [5]}, "head 5"),
        ({"max_size": 0}, "max_size 0"),
        ({"layers": "decoder"}, "matches none"),
    ):
        with pytest.raises(ValueError, match=message):
            attention_maps(model, {"input_ids": ids}, **options)
