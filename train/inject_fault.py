"""Make attention fail for real, as something to detect.

No measured number is ever written by hand.

``high_lr``: a learning rate far too high for a model without query/key normalisation.
``scale_qk``: the query and key projections are multiplied by a factor, once (a wrong merge of
checkpoints) or at each of many steps (as a weight decay of the wrong sign on these weights would).
Scores grow with its square; nothing else is touched.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor, nn

from stabmon._settings import Bounds, Count, Positive


@dataclass(frozen=True)
class HighLr:
    """Every learning rate of the run, from its first step on, times ``factor``."""

    factor: Positive = 30.0


@dataclass(frozen=True)
class ScaleQk:
    """W_q and W_k (and their biases) times ``factor`` after each of some steps.

    The optimizer's steps ``start … start + steps - 1``.
    """

    factor: Positive = 1.02
    start: Count = 150
    """Optimizer step, counted from 1."""
    steps: Count = 1000
    layers: list[Annotated[int, Bounds(0)]] | None = None
    """Attention layers, counted from 0; None for all."""

    def apply(self, model: nn.Module, step: int) -> None:
        """Scale the weights if due after optimizer step ``step``.

        Raises:
            ValueError: if the model has no known query and key projections, or fewer layers than
                named.
        """
        if not self.start <= step < self.start + self.steps:
            return
        layers = list(query_key_weights(model))
        chosen = range(len(layers)) if self.layers is None else self.layers
        if not layers or any(layer not in range(len(layers)) for layer in chosen):
            raise ValueError(
                f"scale_qk.layers is {self.layers}, but {len(layers)} attention layers were found "
                "in the model"
            )
        with torch.no_grad():
            for layer in chosen:
                for weight in layers[layer]:
                    weight.mul_(self.factor)


def query_key_weights(model: nn.Module) -> Iterator[list[Tensor]]:
    """Yield views of each attention layer's query and key weights.

    Two projections, or the front of a fused one.
    """
    for module in model.modules():
        children = dict(module.named_children())
        if {"q_proj", "k_proj"} <= children.keys():
            yield [p for name in ("q_proj", "k_proj") for p in children[name].parameters()]
        elif "c_attn" in children:  # GPT-2: one Conv1D for q, k, v, its weight [in, out]
            yield [p[..., : p.shape[-1] // 3 * 2] for p in children["c_attn"].parameters()]
        elif "qkv" in children:  # one Linear for q, k, v, its weight [out, in]
            yield [p[: p.shape[0] // 3 * 2] for p in children["qkv"].parameters()]
