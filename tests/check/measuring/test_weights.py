"""Predictions from weights alone: expected scores, and random weights."""

from typing import Any

import numpy as np
import pytest
import torch

from stabmon.check.config import CheckConfig
from stabmon.check.measuring.expect import layer_views
from stabmon.check.measuring.observe import observe
from stabmon.check.measuring.weights import HeadWeights
from tests.support import check_models as models


def views(model: Any, sample: Any) -> list[Any]:
    args, kwargs = ((), sample) if isinstance(sample, dict) else ((sample,), {})
    return layer_views(observe(model, args, kwargs, CheckConfig()), None)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"scale": 1.0},
        {"scale": 0.125, "where": "query"},
        {"scale": 0.125, "where": "scores"},
        {"heads": 8},
    ],
    ids=str,
)
def test_the_spread_of_scores_follows_from_the_weights(changes: dict[str, Any]) -> None:
    (view,) = views(models.hand_written(**changes), models.noise())
    assert view.untrained
    assert view.expected_spread == pytest.approx(view.measured["score_spread"], rel=0.1)


@pytest.mark.parametrize("make", [models.gpt2, models.llama, models.qwen3, models.bert])
def test_so_it_does_in_the_first_layer_of_real_families(make: Any) -> None:
    view = views(make(), models.tokens())[0]
    assert view.untrained
    assert view.expected_spread == pytest.approx(
        view.measured["score_spread"], rel=0.35
    )  # tokens share a part of their embedding in BERT


def test_query_heads_that_share_a_key_head_are_told_apart() -> None:
    model = models.llama()
    attention = model.model.layers[0].self_attn
    with torch.no_grad():
        attention.q_proj.weight[3 * 32 :] *= 3.0
        attention.k_proj.weight[:32] *= 2.0
    view = views(model, models.tokens())[0]
    assert isinstance(view.weights, HeadWeights)
    ratio = view.expected_spread / np.array([2.0, 2.0, 1.0, 3.0])
    assert ratio == pytest.approx(ratio.mean(), rel=0.1)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 50.0])
def test_size_does_not_make_weights_look_trained_but_structure_does(scale: float) -> None:
    model = models.hand_written()
    with torch.no_grad():
        model.qkv.weight *= scale
    assert views(model, models.noise(64))[0].untrained
    left, right = torch.randn(2, 128, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():  # one direction of a quarter of the weights' size
        model.qkv.weight[:128] += torch.outer(left, right) * model.qkv.weight.std() / 4
    assert not views(model, models.noise(64))[0].untrained


def test_gains_of_query_and_key_norms_take_the_place_of_weights() -> None:
    model = models.qwen3()
    with torch.no_grad():
        model.model.layers[0].self_attn.q_norm.weight.fill_(3.0)
    first, second = views(model, models.tokens())
    assert first.weights.normed
    assert first.expected_spread == pytest.approx(3.0)
    assert second.expected_spread == pytest.approx(1.0)
