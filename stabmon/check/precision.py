"""Which number format is enough, on the eager and on the fused path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stabmon.check.arithmetic import FLOAT16_MAX, MANTISSA_BITS, bits_averaged, bits_needed
from stabmon.check.expect import LayerView
from stabmon.check.judge import ALLOWANCE
from stabmon.check.rounding import PATHS
from stabmon.check.settings import DTYPES, CheckConfig


@dataclass(frozen=True)
class Fit:
    """One format on one path, at the layer where it fits worst."""

    path: str
    dtype: str
    safe: bool
    used: bool
    """It is the path that the model takes."""
    bits_needed: float
    """By the bound on the largest score at the length to train at; it may exceed ``bits_kept`` where hardly anything moves."""
    bits_kept: int
    moved: float
    """Probability that rounding moves in the mean row of the worst head, in [0, 1]; NaN where a score is inf."""
    headroom: float
    """By how much products of query and key may grow before they overflow; inf on the fused path, where none is written down."""


def precision_table(views: Sequence[LayerView], config: CheckConfig, overflowed: bool = False) -> tuple[Fit, ...]:
    """A :class:`Fit` for each path and format. ``overflowed``: a forward in the format to train in was not finite."""
    used = "fused" if all(view.info.fused for view in views) else "eager"
    table = []
    for path in PATHS:
        for name, dtype in DTYPES.items():
            kept = MANTISSA_BITS[str(dtype).removeprefix("torch.")]
            need = max(bits_needed(abs(view.expected_max)) - _averaged(path, view) for view in views)
            share = 0.0 if name == "fp32" else _worst_moved(views, path, name)
            headroom = math.inf
            if path == "eager" and name == "fp16":
                product = max(float(np.nan_to_num(view.largest_product, nan=0.0).max()) for view in views)
                headroom = FLOAT16_MAX / product if product > 0 else math.inf
            limit = 2 * config.moved_warning * ALLOWANCE[path]
            judged = 0.0 if name == "fp32" else _worst_moved([view for view in views if not view.biased], path, name)
            safe = judged < limit and headroom > 2
            if overflowed and path == used and name == config.dtype:
                safe = False
            table.append(Fit(path, name, safe, path == used, need, kept, share, headroom))
    return tuple(table)


def _averaged(path: str, view: LayerView) -> float:
    return bits_averaged(view.info.head_dim) if path == "fused" else 0.0


def _worst_moved(views: Sequence[LayerView], path: str, name: str) -> float:
    if not views:
        return 0.0
    shares = np.concatenate([view.measured[f"moved/{path}/{name}"] for view in views])
    return math.nan if np.isnan(shares).any() else float(shares.max())
