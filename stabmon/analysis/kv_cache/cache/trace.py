"""Trace of a compressed cache: evictions, and its size during the prefill."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, eq=False)
class Eviction:
    """Keys lost by one layer at one step."""

    step: int
    """Step of the eviction: 0 for the prompt, then 1, 2, … for each forward after it."""
    layer: str
    positions: np.ndarray
    """``[B, H_kv, r]`` int64, ascending; -1 in heads with fewer than r losses."""


@dataclass(frozen=True)
class Stage:
    """The cache's size around one layer's prefill, over layers with removable keys."""

    layer: str
    bytes_before: int
    """Bytes with this layer's full cache, the most at this stage."""
    bytes_after: int
