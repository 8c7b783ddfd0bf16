"""The models of a study: as they are, with controllers, with matched controls.

A matched control adds as many parameters of another kind. H heads, D width.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon.controllers import attach_controllers
from stabmon.study.settings import SettingsError

BASE = "base"


@dataclass(frozen=True)
class Variant:
    """One row of the table."""

    controller: str | None
    """Name of a controller; None for none."""
    options: dict[str, Any] = field(default_factory=dict)
    rank: int = 0
    """Rank of the low-rank additions to query and key projections; 0 for none."""


VARIANTS: dict[str, Variant] = {
    BASE: Variant(None),
    "key_bias": Variant("info_density", {"form": "key_bias"}),
    "query_gain": Variant("info_density", {"form": "query_gain"}),
    "both": Variant("info_density", {"form": "both"}),
    "linear_ramp": Variant("linear_ramp"),
    "linear_ramp_learned": Variant("linear_ramp", {"learned": True}),
    "linear_ramp_learned_from_softmax": Variant("linear_ramp", {"learned": True, "start": 0.02}),
    "linearization": Variant("linearization"),
    "matched_control": Variant(None, rank=1),
    "matched_control_of_both": Variant(None, rank=2),
}
"""Variants by name.

A matched control adds ``x A B`` of so low a rank to queries and keys, with about as many parameters
as a controller: 4 D per layer and rank where queries and keys are as wide as the model, against H D
+ H for one form of info_density: as many where H is 4.
"""


def apply_variant(model: nn.Module, name: str, limits: dict[str, float]) -> list[nn.Parameter]:
    """Turn ``model`` into the variant; return the added parameters.

    Args:
        model: a model of transformers.
        name: one of :data:`VARIANTS`.
        limits: ``bias_max`` and ``gain_max`` of info_density.

    Raises:
        SettingsError: for an unknown variant.
    """
    if name not in VARIANTS:
        raise SettingsError(f"variants: unknown {name!r}. Known: {', '.join(VARIANTS)}")
    variant = VARIANTS[name]
    if variant.controller is not None:
        options = variant.options | (limits if variant.controller == "info_density" else {})
        return list(attach_controllers(model, variant.controller, **options).parameters())
    return add_low_rank(model, variant.rank) if variant.rank else []


class LowRank(nn.Module):
    """``x A B``, added to the output of a projection; 0 at first.

    The smallest addition to queries or keys that can learn.
    """

    def __init__(self, inputs: int, outputs: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, inputs) / math.sqrt(inputs))
        self.up = nn.Parameter(torch.zeros(outputs, rank))

    def forward(self, x: Tensor) -> Tensor:
        """Map ``[..., inputs]`` to ``[..., outputs]``."""
        return F.linear(F.linear(x, self.down), self.up)


def add_low_rank(model: nn.Module, rank: int) -> list[nn.Parameter]:
    """Add :class:`LowRank` to every projection of queries and of keys.

    ``x`` is the projection's input.

    Args:
        model: a module with projections named q_proj and k_proj.
        rank: of the additions.

    Raises:
        SettingsError: if the model has no such projections.
    """
    added: list[nn.Parameter] = []
    for name, module in list(model.named_modules()):
        if name.rpartition(".")[2] in ("q_proj", "k_proj") and isinstance(module, nn.Linear):
            addition = LowRank(module.in_features, module.out_features, rank)
            module.add_module("low_rank", addition)
            module.register_forward_hook(_add_low_rank)
            added += addition.parameters()
    if not added:
        raise SettingsError(
            "variants: matched controls need projections named q_proj and k_proj: use "
            "model.architecture=llama"
        )
    return added


def _add_low_rank(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor:
    return output + module.get_submodule("low_rank")(args[0])  # type: ignore[no-any-return]
