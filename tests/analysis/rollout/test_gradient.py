"""Gradient-weighted rollout against autograd through eager maps that keep their gradients."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from stabmon.analysis.rollout.api import attention_rollout
from tests.support import rollout_models as models


def top_of_last(case: models.Case) -> Callable[[Any], Tensor]:
    """Log-probability of the top token at each sample's last valid position."""
    places = [int(each.nonzero()[-1]) for each in case.valid]
    return lambda output: sum(
        output.logits[i, n].log_softmax(-1).max() for i, n in enumerate(places)
    )


def top_class(_: models.Case) -> Callable[[Any], Tensor]:
    return lambda output: output.logits.log_softmax(-1).amax(-1).sum()


def third_class(_: models.Case) -> Callable[[Any], Tensor]:
    return lambda output: output.logits.log_softmax(-1)[:, 3].sum()


def weighted(
    case: models.Case, objective: Callable[[Any], Tensor], kinds: tuple[str, ...] = ("own",)
) -> list[list[Tensor]]:
    """E_h relu(A * dL/dA) of each layer as one-headed maps, by kind."""
    output, _ = models.eager(case)
    names = {
        "own": ("attentions", "decoder_attentions"),
        "encoder": ("encoder_attentions",),
        "cross": ("cross_attentions",),
    }
    maps = [
        next(output[name] for name in names[kind] if output.get(name) is not None) for kind in kinds
    ]
    for each in (layer for part in maps for layer in part):
        each.retain_grad()
    objective(output).backward()
    return [
        [(each * each.grad).relu().mean(1, keepdim=True).detach() for each in part] for part in maps
    ]


@pytest.mark.parametrize(
    ("make", "objective", "options"),
    [
        (models.llama, top_of_last, {}),
        (models.mistral, top_of_last, {}),
        (models.gpt2, top_of_last, {}),
        (models.bert, top_of_last, {}),
        (models.vit, top_class, {}),
        (models.vit, third_class, {"objective": 3}),
        (models.vit, third_class, {"objective": torch.tensor([3, 3])}),
        (models.t5, top_of_last, {}),
    ],
)
def test_equals_autograd(
    make: Callable[[], models.Case],
    objective: Callable[[models.Case], Callable[[Any], Tensor]],
    options: dict[str, Any],
) -> None:
    case = make()
    (maps,) = weighted(case, objective(case))
    dense = models.dense_rollout(maps)
    rollout = attention_rollout(case.model, case.batch, weighting="gradient", **options)
    assert float((rollout.matrix - dense)[case.valid].abs().max()) <= 1e-5
    off = dense - torch.diag_embed(dense.diagonal(dim1=1, dim2=2))
    assert float(off.amax()) > 1e-3  # the weights say something
    assert rollout.weighting == "gradient"


def test_encoder_and_joined_stacks() -> None:
    encoder = models.t5("encoder")
    objective = top_of_last(models.t5())
    own, decoder, cross = weighted(encoder, objective, ("encoder", "own", "cross"))
    rollout = attention_rollout(encoder.model, encoder.batch, weighting="gradient", stack="encoder")
    assert float((rollout.matrix - models.dense_rollout(own))[encoder.valid].abs().max()) <= 1e-5
    joined = attention_rollout(encoder.model, encoder.batch, weighting="gradient", stack="joined")
    assert float((joined.matrix - models.dense_joined(own, decoder, cross)).abs().max()) <= 1e-5


def test_target_is_differentiated_and_rolled_down() -> None:
    case = models.llama()
    (maps,) = weighted(case, lambda output: output.logits[:, 4].log_softmax(-1).amax(-1).sum())
    dense = models.dense_rollout(maps)
    rollout = attention_rollout(case.model, case.batch, weighting="gradient", targets=4)
    assert float((rollout.matrix[:, 0] - dense[:, 4]).abs().max()) <= 1e-5


def test_parameters_and_their_gradients_are_left_alone() -> None:
    case = models.gpt2()
    parameters = list(case.model.parameters())
    parameters[1].requires_grad_(False)
    parameters[0].grad = torch.ones_like(parameters[0])
    attention_rollout(case.model, case.batch, weighting="gradient")
    assert torch.equal(parameters[0].grad, torch.ones_like(parameters[0]))
    assert all(each.grad is None for each in parameters[1:])
    assert [each.requires_grad for each in parameters] == [True, False] + [True] * (
        len(parameters) - 2
    )


def test_frozen_models_and_torch_s_encoder() -> None:
    torch.manual_seed(0)
    model = models.sharpen(
        nn.TransformerEncoder(
            nn.TransformerEncoderLayer(16, 2, 16, batch_first=True), 2, enable_nested_tensor=False
        )
    )
    batch, objective = torch.randn(2, 5, 16), lambda output: output[:, -1, 0].sum()
    free = attention_rollout(model, batch, weighting="gradient", objective=objective)
    frozen = attention_rollout(
        model.requires_grad_(False), batch, weighting="gradient", objective=objective
    )
    assert torch.equal(free.matrix, frozen.matrix)
    off = free.matrix - torch.diag_embed(free.matrix.diagonal(dim1=1, dim2=2))
    assert float(off.amax()) > 1e-3


@pytest.mark.parametrize(
    ("make", "options", "message"),
    [
        (models.vit, {"objective": 5}, "objective 5 is not a class: there are 5"),
        (models.llama, {"objective": lambda output: output.logits}, "must return one number"),
        (
            functools.partial(models.Case, models.TinyGPT(), models.ids(), torch.ones(3, 11)),
            {},
            "has its own",
        ),
    ],
)
def test_refuses_what_does_not_fit(
    make: Callable[[], models.Case], options: dict[str, Any], message: str
) -> None:
    case = make()
    with pytest.raises(ValueError, match=message):
        attention_rollout(case.model, case.batch, weighting="gradient", **options)


def test_asks_for_an_objective_where_there_are_no_logits() -> None:
    case = models.bert()
    with pytest.raises(ValueError, match="give objective="):
        attention_rollout(case.model.bert, case.batch, weighting="gradient")  # type: ignore[arg-type]
