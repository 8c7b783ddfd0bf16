"""Factors by which the scores of heads come to their targets."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from stabmon.interventions.effects.effect import Place


def module_name(layer: str | None) -> str:
    """Return the module's name in a layer's name, without the call's number."""
    return str(layer).partition("#")[0]


def layers_of(places: Iterable[Place]) -> list[str]:
    """Return the layers of some places, each once."""
    return list(dict.fromkeys(str(layer) for layer, _ in places))


def head_factors(
    scores: Mapping[str, np.ndarray], targets: Mapping[Place, float]
) -> dict[str, dict[int, float]]:
    """Return the factor of each head above its target, by module.

    Args:
        scores: ``[H]`` largest scores, by layer.
        targets: the largest allowed score of each (layer, head).

    Returns:
        Factors in (0, 1) by module and head; a head with a score that is not finite has none.

    Example:
        >>> head_factors({"attn": np.array([8.0, 3.0])}, {("attn", 0): 4.0, ("attn", 1): 4.0})
        {'attn': {0: 0.5}}
    """
    found: dict[str, dict[int, float]] = {}
    for (layer, head), target in targets.items():
        values = scores.get(str(layer))
        if (
            values is None
            or head is None
            or head >= len(values)
            or not target < values[head] < np.inf
        ):
            continue
        factors = found.setdefault(module_name(layer), {})
        factors[head] = min(factors.get(head, 1.0), target / float(values[head]))
    return found


def module_scores(
    name: str, places: Iterable[Place], scores: Mapping[str, np.ndarray]
) -> dict[int, float]:
    """Return the largest finite score of each held head of a module, over its calls.

    Args:
        name: the module's name.
        places: the heads that are held.
        scores: ``[H]`` largest scores, by layer.
    """
    found: dict[int, float] = {}
    for layer, head in places:
        values = scores.get(str(layer), np.array([]))
        if (
            module_name(layer) == name
            and head is not None
            and head < len(values)
            and np.isfinite(values[head])
        ):
            found[head] = max(found.get(head, -np.inf), float(values[head]))
    return found


def before_and_after(
    places: Iterable[Place],
    factors: Mapping[str, Mapping[int, float]],
    scores: Mapping[str, np.ndarray],
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return scores before and after a clip, for the record.

    Args:
        places: the heads that are held.
        factors: the factors of the clip, by module and head.
        scores: ``[H]`` scores before, by layer.
    """
    clipped = [
        (layer, head) for layer, head in places if head in factors.get(module_name(layer), {})
    ]
    before = {
        f"{layer} head {head}": float(scores[str(layer)][head or 0]) for layer, head in clipped
    }
    after = {
        f"{layer} head {head}": before[f"{layer} head {head}"]
        * factors[module_name(layer)][head or 0]
        for layer, head in clipped
    }
    return {"max_logit": before}, {"max_logit": after}
