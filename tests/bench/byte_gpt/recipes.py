"""Recipes of runs: 69 chosen by hand, and 61 whose parameters are drawn.

No recipe says whether its run fails; that is for the outcome to say.
"""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Literal

from tests.bench.byte_gpt.chosen import chosen
from tests.bench.byte_gpt.drawn import draw
from tests.bench.byte_gpt.recipe import Recipe

Kind = Literal[
    "none",
    "rate",
    "query_key_rate",
    "scale",
    "scale_ramp",
    "initialisation",
    "query_key_jump",
    "exp_softmax",
    "format",
    "labels",
    "batch",
    "weight_decay",
    "embedding",
    "mlp",
    "head",
    "rate_spike",
    "optimizer",
]
"""Fault of a recipe."""
_KIND_OF_FAULT: dict[str, Kind] = {
    "random_labels": "labels",
    "random_batch": "batch",
    "rate": "rate_spike",
    "rate:mlp": "mlp",
    "rate:head": "head",
    "rate:embedding": "embedding",
    "weight_decay": "weight_decay",
    "embedding": "embedding",
    "embedding_nan": "embedding",
    "mlp": "mlp",
    "query_key": "query_key_jump",
}


@cache
def recipes() -> dict[str, Recipe]:
    """Return every recipe by name, paired runs and counterfactuals included."""
    found = {each.name: each for each in chosen() + draw(20251125, "D") + draw(20251126, "E")}
    normed = replace(found["sgd.5"], name="sgd.5_qkn", paired="sgd.5_qkn", qk_norm=True)
    return found | {normed.name: normed}


def kind_of(recipe: Recipe) -> Kind:
    """Return the fault of a recipe beside its paired one; ``none`` where nothing is wrong."""
    pair = recipes()[recipe.paired]
    faulty: list[tuple[bool, Kind]] = [
        (recipe.precision.startswith("exp_"), "exp_softmax"),
        (recipe.scale != pair.scale, "scale"),
        (recipe.scale_ramp is not None, "scale_ramp"),
        (recipe.query_key_init != 1, "initialisation"),
        (recipe.query_key_rate != 1, "query_key_rate"),
        (bool(recipe.faults), _KIND_OF_FAULT[recipe.faults[0].name] if recipe.faults else "none"),
        (recipe.optimizer == "sgd", "optimizer"),
        (recipe.rate > pair.rate, "rate"),
        (recipe.precision in ("float16_scores", "bfloat16_scores"), "format"),
    ]
    return next((kind for holds, kind in faulty if holds), "none")


def has_fault(recipe: Recipe) -> bool:
    """Return whether something was injected, or the rate is above the paired run's."""
    pair = recipes()[recipe.paired]
    changed = recipe.query_key_init != 1 or recipe.query_key_rate != 1 or recipe.scale != 1
    driven = bool(recipe.faults) or recipe.scale_ramp is not None
    return changed or driven or recipe.rate > pair.rate
