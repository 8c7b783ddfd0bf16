"""The region of stable attention over temperature, size, length and format.

A temperature T divides scores, 1 being the model as it is; the head dimension changes alone, with a
scale of ``1 / sqrt(D)`` as far as the model's own is one. At every grid point four margins are
taken, in bits (powers of two to the limit, above 0 being stable):

- *saturation*: up to the spread at which half of a row's entropy is gone at initialisation;
- *precision*: mantissa bits of the format, less those needed by the largest score to expect of a
  row on the model's path;
- *curvature*: the same, less those that keep rounding within the softmax's linear regime;
- *overflow*: up to a quarter of float16's range for the product of query and key, where it is
  written.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from stabmon._torch.number_formats import MANTISSA_BITS, bits_averaged, format_of
from stabmon.check.config import DTYPES, CheckConfig
from stabmon.check.measuring.arithmetic import (
    bits_needed,
    curvature_bits,
    expected_curvature,
    expected_entropy,
    expected_maximum,
)
from stabmon.check.measuring.expect import LayerView

CAUSES = ("saturation", "precision", "curvature", "overflow")
TEMPERATURES = tuple(2.0**power for power in range(-8, 4))
HEAD_DIMS = (2, 4, 8, 16, 32, 64, 128, 256)
LENGTHS = tuple(2**power for power in range(7, 18))


@dataclass(frozen=True)
class OperatingPoint:
    """The model's own position: its layer of widest scores."""

    spread: float
    head_dim: int
    seq_len: int
    scale: float
    fused: bool

    @classmethod
    def of(cls, views: Sequence[LayerView]) -> OperatingPoint:
        """Return the operating point of the layer with the widest scores."""
        view = max(views, key=lambda each: float(each.spread[each.widest]))
        scale = abs(view.scale) or 1.0
        return cls(
            float(view.spread[view.widest]), view.info.head_dim, view.keys, scale, view.info.fused
        )


@dataclass(frozen=True)
class GridPoint:
    """One point of the grid."""

    temperature: float
    head_dim: int
    seq_len: int
    dtype: str
    margins: tuple[float, float, float, float]
    """Margins in bits, in the order of :data:`CAUSES`; inf where one cannot bind."""

    @property
    def margin(self) -> float:
        """Return the smallest margin."""
        return min(self.margins)

    @property
    def stable(self) -> bool:
        """Return whether no limit is crossed."""
        return self.margin >= 0

    @property
    def cause(self) -> str:
        """Return the binding limit."""
        return CAUSES[self.margins.index(self.margin)]


def grid_point(
    origin: OperatingPoint,
    temperature: float,
    head_dim: int,
    seq_len: int,
    dtype: str,
    config: CheckConfig,
) -> GridPoint:
    """Compute the margins at one grid point.

    Args:
        origin: the model's own position.
        temperature: divisor of the model's scores.
        head_dim: D.
        seq_len: keys of a row.
        dtype: ``fp16``, ``bf16`` or ``fp32``.
        config: levels.
    """
    spread = origin.spread / temperature
    scale = origin.scale * math.sqrt(origin.head_dim / head_dim) / temperature
    kept = MANTISSA_BITS[format_of(DTYPES[dtype])]
    largest = expected_maximum(spread, seq_len)
    averaged = bits_averaged(head_dim) if origin.fused else 0.0
    precision = kept - (bits_needed(largest) - averaged)
    curvature = kept - curvature_bits(*_curvature(round(spread, 9), seq_len, head_dim, scale))
    overflow = math.inf
    if dtype == "fp16" and not origin.fused and largest > 0:
        overflow = math.log2(config.product_warning * scale / largest)
    saturation = (
        math.log2(_widest(seq_len, config.condensed_warning) / spread) if spread > 0 else math.inf
    )
    return GridPoint(
        temperature, head_dim, seq_len, dtype, (saturation, precision, curvature, overflow)
    )


def stability_region(
    origin: OperatingPoint,
    config: CheckConfig,
    temperatures: Sequence[float] = TEMPERATURES,
    head_dims: Sequence[int] = HEAD_DIMS,
    lengths: Sequence[int] = LENGTHS,
) -> list[GridPoint]:
    """Compute every point of the grid.

    Args:
        origin: the model's own position.
        config: levels.
        temperatures: divisors of the model's scores.
        head_dims: head dimensions; the model's own is added.
        lengths: lengths in tokens; the model's own is added.
    """
    dims = sorted({*head_dims, origin.head_dim})
    sizes = sorted({*lengths, origin.seq_len})
    return [
        grid_point(origin, temperature, dim, size, dtype, config)
        for dtype in DTYPES
        for temperature in temperatures
        for dim in dims
        for size in sizes
    ]


def region_data(origin: OperatingPoint, points: Sequence[GridPoint]) -> dict[str, Any]:
    """Return the region in plain values, one row per point."""
    columns = [
        "temperature",
        "head_dim",
        "seq_len",
        "dtype",
        "stable",
        "cause",
        "margin",
        *(f"{cause}_margin" for cause in CAUSES),
    ]
    rows = [
        [p.temperature, p.head_dim, p.seq_len, p.dtype, p.stable, p.cause, p.margin, *p.margins]
        for p in points
    ]
    here = {
        "temperature": 1.0,
        "head_dim": origin.head_dim,
        "seq_len": origin.seq_len,
        "score_std": origin.spread,
    }
    return {
        "unit": "bits to the limit",
        "model": here | {"fused": origin.fused},
        "columns": columns,
        "rows": rows,
    }


def grid(
    points: Sequence[GridPoint], dtype: str, across: str, fixed: int
) -> Iterator[tuple[float, list[GridPoint]]]:
    """Yield rows of points by temperature.

    Args:
        points: the region.
        dtype: format of the points.
        across: ``seq_len`` or ``head_dim``, the axis along a row.
        fixed: value of the other axis.
    """
    other = "head_dim" if across == "seq_len" else "seq_len"
    chosen = [p for p in points if p.dtype == dtype and getattr(p, other) == fixed]
    for temperature in dict.fromkeys(p.temperature for p in chosen):
        yield (
            temperature,
            sorted(
                (p for p in chosen if p.temperature == temperature),
                key=lambda p: float(getattr(p, across)),
            ),
        )


_curvature = functools.lru_cache(maxsize=4096)(expected_curvature)


@functools.lru_cache(maxsize=256)
def _widest(keys: int, share: float) -> float:
    """Return the spread of rows with ``share`` of their entropy left, by bisection."""
    low, high = 0.0, 4 * math.sqrt(2 * math.log(max(keys, 2)))
    for _ in range(24):
        middle = (low + high) / 2
        low, high = (
            (middle, high)
            if expected_entropy(middle, keys) > share * math.log(max(keys, 2))
            else (low, middle)
        )
    return low
