"""Numbers, counts and layer names in words, for every page."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from stabmon.figures.labels import short_names


def short_layers(layers: Sequence[str]) -> tuple[list[str], str]:
    """Shorten layer names to the parts in which they differ.

    Returns:
        The short names, and a sentence on their meaning; empty if nothing was cut.

    Example:
        >>> short_layers(["h.0.attn", "h.1.attn"])
        (['0', '1'], 'Layer 0 stands for h.0.attn, and so on.')
    """
    names, pattern = short_names(list(layers))
    if not pattern or len(set(names)) < len(names):
        return list(layers), ""
    return names, f"Layer {names[0]} stands for {layers[0]}, and so on."


def map_names(layers: Sequence[str]) -> list[str]:
    """Return the layers' names for the map's selector.

    >>> map_names(["h.0.attn", "h.1.attn"])
    ['layer 0', 'layer 1']
    """
    names, meaning = short_layers(layers)
    return [f"layer {name}" for name in names] if meaning else names


def number(value: Any, digits: int = 3) -> str:
    """Return a number for readers; ``–`` for NaN and None.

    >>> number(0.12345), number(float("nan")), number(7), number(float("inf"))
    ('0.123', '–', '7', '∞')
    """
    if value is None or (isinstance(value, float | np.floating) and np.isnan(value)):
        return "–"
    if isinstance(value, int | np.integer):
        return f"{value:,}"
    if isinstance(value, float | np.floating):
        return ("∞" if value > 0 else "-∞") if np.isinf(value) else f"{value:.{digits}g}"
    return str(value)


def percent(value: float) -> str:
    """Return a share in per cent.

    >>> percent(0.123), percent(0.0004), percent(float("nan"))
    ('12%', '0.04%', '–')
    """
    if np.isnan(value):
        return "–"
    return f"{value:.0%}" if value >= 0.095 or value == 0 else f"{100 * value:.2g}%"


def plural(count: int, word: str) -> str:
    """Return a count and its noun.

    >>> plural(1, "layer"), plural(1200, "head")
    ('1 layer', '1,200 heads')
    """
    return f"{count:,} {word}{'' if count == 1 else 's'}"
