"""Controlled attention written out densely, as its formulas say, in place of a model's own
attention function.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.masking_utils import AttentionMaskInterface, eager_mask
from transformers.modeling_utils import AttentionInterface

from stabmon.controllers import attach_controllers, detach_controllers
from tests.support.attention_zoo import zoo

NAME = "dense_reference"


def built(
    name: str, kind: str = "info_density", seed: int = 3, **options: Any
) -> tuple[Any, dict[str, Any], Any]:
    """A model of the zoo in evaluation mode, its inputs, and controllers in it whose parameters are
    drawn at random.
    """
    model, inputs = zoo()[name]()
    controllers = attach_controllers(model.eval(), kind, **options)
    scatter(controllers, seed)
    return model, inputs, controllers


def scatter(controllers: nn.Module, seed: int = 3) -> None:
    """Draw all parameters, large enough to tell one attention pattern from another."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in controllers.parameters():
            parameter.copy_(
                torch.randn(parameter.shape, generator=generator) / math.sqrt(parameter.shape[-1])
            )


def output_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    """The logits of a model, or what stands for them."""
    found = model(**inputs)
    tensor: Tensor = found.logits if hasattr(found, "logits") else found.last_hidden_state
    return tensor


def dense_output(
    model: nn.Module, inputs: dict[str, Any], seen: list[Tensor] | None = None
) -> Tensor:
    """What a controlled model's output must be: an uncontrolled copy of it with the formulas
    written out in every layer.

    ``seen`` gets the weights ``[B, H, Q, K]`` of each layer.
    """
    members = {
        name: copy.deepcopy(module.stabmon_controller)
        for name, module in model.named_modules()
        if "stabmon_controller" in module._modules
    }
    plain = copy.deepcopy(model)
    detach_controllers(plain)
    modules = {
        id(module): members[name] for name, module in plain.named_modules() if name in members
    }
    hidden: dict[int, Tensor] = {}

    def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden[id(module)] = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]

    for module in plain.modules():
        if id(module) in modules:
            module.register_forward_pre_hook(keep, with_kwargs=True)

    def attention(
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Any,
        **kwargs: Any,
    ) -> Any:
        of = modules.get(id(module)), hidden.get(id(module))
        output, weights = dense_attention(*of, query, key, value, attention_mask, kwargs)
        if seen is not None:
            seen.append(weights)
        return output, weights

    with registered(attention):
        for module in plain.modules():
            if hasattr(module, "config"):
                module.config._attn_implementation = NAME
        return output_of(plain, inputs)


@contextmanager
def registered(attention: Callable[..., Any]) -> Iterator[None]:
    """``attention`` is known to transformers."""
    AttentionInterface.register(NAME, attention)
    AttentionMaskInterface.register(NAME, eager_mask)
    try:
        yield
    finally:
        del AttentionInterface._global_mapping[NAME], AttentionMaskInterface._global_mapping[NAME]


def dense_attention(
    controller: Any,
    hidden: Tensor | None,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    kwargs: dict[str, Any],
) -> tuple[Tensor, Tensor]:
    """Scores ``[B, H, Q, K]``, then everything in the order of the formulas."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, dim=1), value.repeat_interleave(group, dim=1)
    scores = kwargs["scaling"] * torch.einsum("bhid,bhjd->bhij", query, key)
    if controller is not None and hasattr(controller, "form"):
        assert hidden is not None
        densities = {
            part: torch.tanh(
                F.layer_norm(hidden, hidden.shape[-1:]) @ getattr(controller, f"{part}_weight").T
                + getattr(controller, f"{part}_bias")
            ).transpose(1, 2)
            for part in controller.parts
        }
        if "query_gain" in densities:
            scores = scores * controller.gain_max ** densities["query_gain"][:, :, :, None]
        if "key_bias" in densities:
            scores = scores + controller.bias_max * densities["key_bias"][:, :, None, :]
    softcap = kwargs.get("softcap")
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if kwargs.get("position_bias") is not None:
        scores = scores + kwargs["position_bias"]
    visible = (
        torch.ones_like(scores, dtype=torch.bool)
        if mask is None
        else (mask >= torch.finfo(mask.dtype).min / 2).expand_as(scores)
    )
    softmax = torch.softmax(scores.masked_fill(~visible, -torch.inf), dim=-1).nan_to_num(0.0)
    share = getattr(controller, "linear_share", lambda: None)()
    if share is None:
        weights = softmax
    else:
        linear = torch.zeros_like(scores)
        for row in torch.cartesian_prod(*(torch.arange(n) for n in scores.shape[:3])).tolist():
            at = tuple(row)
            seen = scores[at][visible[at]]
            if len(seen):
                lifted = seen - seen.min() + 1
                linear[at] = torch.zeros_like(scores[at]).masked_scatter(
                    visible[at], lifted / lifted.sum()
                )
        share = share[:, None, None] if isinstance(share, Tensor) else share
        weights = share * linear + (1 - share) * softmax
    return (weights @ value).transpose(1, 2).contiguous(), weights
