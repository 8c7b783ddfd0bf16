"""Scaling W_q and W_k is a real state of the weights.

Scores grow with the factor's square, and nothing else is touched.
"""

from __future__ import annotations

import pytest
import torch
from gpt import GPT, GPTShape
from hf_gpt import Shape, make_model
from inject_fault import ScaleQk, query_key_weights
from torch import nn

SMALL = {"layers": 2, "heads": 2, "width": 16}
MODELS = {
    "own": lambda: GPT(GPTShape(**SMALL)),
    "llama": lambda: make_model(Shape("llama", kv_heads=1, **SMALL), 32),
    "gpt2": lambda: make_model(Shape("gpt2", **SMALL), 32),
}


@pytest.mark.parametrize("name", MODELS)
def test_queries_and_keys_are_multiplied_and_values_are_not(name: str) -> None:
    torch.manual_seed(0)
    model = MODELS[name]()
    for parameter in model.parameters():
        nn.init.normal_(parameter)  # biases too must be seen to change
    seen: list[dict[str, torch.Tensor]] = []
    for apply in (False, True):
        if apply:
            ScaleQk(factor=3, start=5, steps=1, layers=[1]).apply(model, step=5)
        seen.append(projections(model))
    before, after = seen
    for part in before:
        factor = 3 if part in ("1 query", "1 key") else 1
        torch.testing.assert_close(after[part], factor * before[part])


@pytest.mark.parametrize(("step", "times"), [(4, 0), (5, 1), (7, 1), (8, 0)])
def test_it_acts_at_its_steps_alone(step: int, times: int) -> None:
    model = GPT(GPTShape(**SMALL))
    before = [part.clone() for parts in query_key_weights(model) for part in parts]
    ScaleQk(factor=2, start=5, steps=3).apply(model, step)
    for old, new in zip(
        before, (part for parts in query_key_weights(model) for part in parts), strict=True
    ):
        assert torch.equal(new, old * 2**times)


def test_a_layer_that_is_not_there_is_refused() -> None:
    with pytest.raises(ValueError, match=r"scale_qk.layers is \[2\], but 2 attention layers"):
        ScaleQk(start=1, layers=[2]).apply(GPT(GPTShape(**SMALL)), step=1)
    with pytest.raises(ValueError, match="but 0 attention layers"):
        ScaleQk(start=1).apply(nn.Linear(2, 2), step=1)


def projections(model: nn.Module) -> dict[str, torch.Tensor]:
    """Return query, key and value of each layer's projections for one fixed input."""
    x = torch.randn(3, 16, generator=torch.Generator().manual_seed(1))
    out: dict[str, torch.Tensor] = {}
    layer = 0
    for module in model.modules():
        children = dict(module.named_children())
        if "q_proj" in children:
            parts = [children[name](x) for name in ("q_proj", "k_proj", "v_proj")]
        elif fused := children.get("qkv", children.get("c_attn")):
            parts = list(fused(x[None])[0].chunk(3, dim=-1))
        else:
            continue
        out |= {
            f"{layer} {name}": part.detach().clone()
            for name, part in zip(("query", "key", "value"), parts, strict=True)
        }
        layer += 1
    assert layer == 2
    return out
