"""Sufficient number formats, on the eager and on the fused path."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from stabmon._torch.number_formats import LARGEST, MANTISSA_BITS, bits_averaged, format_of
from stabmon.check.config import DTYPES, CheckConfig
from stabmon.check.judging.judge import ALLOWANCE
from stabmon.check.measuring.arithmetic import bits_needed
from stabmon.check.measuring.expect import LayerView
from stabmon.check.measuring.rounding import PATHS


@dataclass(frozen=True)
class FormatVerdict:
    """Verdict on one format on one path, at the layer with the worst fit."""

    path: str
    dtype: str
    safe: bool
    used: bool
    """True for the model's own path."""
    bits_needed: float
    """Bits needed to keep ``moved`` within ``allowed``.

    Above ``bits_kept`` exactly where rounding moves too much.
    """
    bits_kept: int
    moved: float
    """Probability moved by rounding in the worst head's mean row, in [0, 1].

    NaN where a score is inf.
    """
    allowed: float
    """Limit of ``moved`` for a sufficient format, exclusive."""
    headroom: float
    """Factor left for products of query and key to grow before they overflow.

    inf on the fused path, where no product is written.
    """


def precision_table(
    views: Sequence[LayerView], config: CheckConfig, overflowed: bool = False
) -> tuple[FormatVerdict, ...]:
    """Return a :class:`FormatVerdict` for each path and format.

    Args:
        views: the layers.
        config: levels and the format to train in.
        overflowed: True where a forward in the format to train in was not finite.
    """
    used = "fused" if all(view.info.fused for view in views) else "eager"
    table: list[FormatVerdict] = []
    for path in PATHS:
        for name, dtype in DTYPES.items():
            kept = MANTISSA_BITS[format_of(dtype)]
            share = 0.0 if name == "fp32" else _worst_moved(views, path, name)
            headroom = math.inf
            if path == "eager" and name == "fp16":
                product = max(
                    float(np.nan_to_num(view.largest_product, nan=0.0).max()) for view in views
                )
                headroom = LARGEST["float16"] / product if product > 0 else math.inf
            limit = 2 * config.moved_warning * ALLOWANCE[path]
            judged = (
                0.0
                if name == "fp32"
                else _worst_moved([view for view in views if not view.biased], path, name)
            )
            safe = judged < limit and headroom > 2
            if overflowed and path == used and name == config.dtype:
                safe = False
            bound = max(
                bits_needed(abs(view.expected_max)) - _averaged(path, view) for view in views
            )
            # float32 is not tried out: what the shorter formats need is what it is enough for
            need = (
                max(fit.bits_needed for fit in table[-2:])
                if name == "fp32"
                else _need(judged, limit, kept, bound)
            )
            table.append(
                FormatVerdict(path, name, safe, path == used, need, kept, share, limit, headroom)
            )
    return tuple(table)


def _need(moved: float, allowed: float, kept: int, bound: float) -> float:
    """Return the bits for rounding to move just the allowed probability.

    A bit more halves the probability ``moved`` at ``kept`` bits. Where more is moved than allowed,
    the need is at least the ``bound`` by the largest score: the moved probability ends at 1 and
    does not tell large needs apart. Below, the bound does not count, since it takes the largest
    score for the whole row.
    """
    if math.isnan(moved):
        return max(bound, kept + 1.0)
    need = kept + math.log2(moved / allowed) if moved > 0 else 0.0
    return max(0.0, need) if moved < allowed else max(need, bound)


def _averaged(path: str, view: LayerView) -> float:
    return bits_averaged(view.info.head_dim) if path == "fused" else 0.0


def _worst_moved(views: Sequence[LayerView], path: str, name: str) -> float:
    if not views:
        return 0.0
    shares = np.concatenate([view.measured[f"moved/{path}/{name}"] for view in views])
    return math.nan if np.isnan(shares).any() else float(shares.max())
