"""What happened to a compressed cache."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Eviction:
    """Keys that one layer lost at one step."""

    step: int
    """0 for the prompt, then 1, 2, … for each forward after it."""
    layer: str
    positions: np.ndarray
    """``[B, H_kv, r]`` int64, ascending; -1 where a head lost fewer than r."""


@dataclass(frozen=True)
class Stage:
    """Record the cache's size around one layer's prefill, over the layers that can lose keys."""

    layer: str
    bytes_before: int
    """With this layer's full cache, the most at this stage."""
    bytes_after: int
