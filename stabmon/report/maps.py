"""Pack attention maps into a page within a budget of bytes.

Q queries, K keys. Values are whole numbers on a linear or a square-root scale between 0 and the
map's own maximum, gzip and base64 around them. The finest form that fits is taken: 65534 levels,
254, 62, then the same on maps pooled by the maximum of square blocks; the page says which.
"""

from __future__ import annotations

import base64
import zlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from stabmon.figures.pooling import block_max_by

BUDGET = 3_800_000
"""Bytes of the packed maps; with pictures the page stays below 5 MB."""
LEVELS = (65534, 254, 62)
"""Levels to try, finest first; the code above the last level is NaN."""


def packed_maps(
    maps: Sequence[np.ndarray],
    layers: Sequence[str],
    *,
    heads: Sequence[Sequence[int]] | None = None,
    queries: Sequence[str] | None = None,
    keys: Sequence[str] | None = None,
    pooled: int = 1,
    unit: str = "attention probability",
    layer: int | None = None,
    title: str = "Map of any layer and head",
    budget: int = BUDGET,
) -> dict[str, Any]:
    """Pack one ``[H, Q, K]`` a layer for the page's interactive map.

    Args:
        maps: values of at least 0; NaN is kept.
        layers: the layers' names.
        heads: the heads' numbers, one list a layer; 0 … H - 1 if None.
        queries: tokens of the queries, before any pooling.
        keys: tokens of the keys, before any pooling.
        pooled: positions a cell stands for already.
        unit: of the values.
        title: the map's heading.
        layer: place of the layer that is shown first; the middle one if None.
        budget: bytes of base64 that may be used.

    Returns:
        For the template: ``meta`` (JSON), ``data`` (base64), ``note`` (resolution, in words),
        ``title`` and ``single`` (True for one map).

    Raises:
        ValueError: if there is no map.

    Example:
        >>> packed = packed_maps([np.eye(4)[None]], ["h.0"])
        >>> packed["meta"]["levels"], packed["meta"]["layers"][0]["rows"]
        (65534, 4)
    """
    if not maps:
        raise ValueError("no maps to pack: give one a layer")
    shrunk, shrunk_by = list(maps), 1
    for levels, factor in _forms(max(max(each.shape[-2:]) for each in maps)):
        if factor != shrunk_by:
            shrunk, shrunk_by = [block_max_by(each, factor) for each in maps], factor
        middle = len(shrunk) // 2
        sizes = [each.size for each in shrunk]
        tried = len(_gzip(_quantised(shrunk[middle], levels)[0].tobytes())) * 4 / 3
        if max(sizes) > 512 and tried * sum(sizes) / sizes[middle] > 2 * budget:  # by one layer
            continue
        codes, tops = zip(*(_quantised(each, levels) for each in shrunk), strict=True)
        raw = b"".join(code.tobytes() for code in codes)
        data = base64.b64encode(_gzip(raw))
        if len(data) <= budget:
            break
    total = factor * pooled
    numbers = heads if heads is not None else [list(range(each.shape[0])) for each in maps]
    described = [
        {
            "name": name,
            "heads": [int(head) for head in each],
            "rows": part.shape[1],
            "cols": part.shape[2],
            "tops": [float(top) for top in top_values],
        }
        for name, each, part, top_values in zip(layers, numbers, shrunk, tops, strict=True)
    ]
    meta = {
        "layers": described,
        "levels": levels,
        "root": levels < 65534,
        "bytes": 2 if levels > 255 else 1,
        "factor": total,
        "unit": unit,
        "queries": list(queries) if queries is not None else None,
        "keys": list(keys) if keys is not None else None,
        "layer": len(maps) // 2 if layer is None else layer,
        "palette": _palette(),
    }
    single = len(maps) == 1 and maps[0].shape[0] == 1
    return {
        "meta": meta,
        "data": data.decode(),
        "note": _note(levels, total),
        "title": title,
        "single": single,
    }


def _forms(side: int) -> Iterator[tuple[int, int]]:
    """Yield levels and pooling factors to try, finest first, down to maps of one cell."""
    factor = 1
    while True:
        for levels in LEVELS:
            yield levels, factor
        if factor >= side:
            return
        factor *= 2


def _quantised(maps: np.ndarray, levels: int) -> tuple[np.ndarray, np.ndarray]:
    """Return codes ``[H, Q, K]`` and each head's maximum.

    The scale is linear at 65534 levels, else a square root.
    """
    values = np.asarray(maps, dtype=np.float32)
    finite = np.isfinite(values)
    tops = np.where(finite, values, 0).max(axis=(1, 2), initial=0.0)
    share = np.clip(np.where(finite, values, 0) / np.where(tops > 0, tops, 1)[:, None, None], 0, 1)
    scaled = share if levels == 65534 else np.sqrt(share)
    kind = "<u2" if levels > 255 else "u1"
    codes = np.where(finite, np.rint(scaled * levels), levels + 1).astype(kind)
    return codes, tops


def _gzip(raw: bytes) -> bytes:
    """Compress by gzip without a time stamp, so that equal numbers give equal pages."""
    packer = zlib.compressobj(9 if len(raw) < 2_000_000 else 5, zlib.DEFLATED, 31)
    return packer.compress(raw) + packer.flush()


def _palette() -> str:
    """Return 256 colours of matplotlib's cividis, 3 bytes each, as base64."""
    from matplotlib import colormaps

    table = np.rint(colormaps["cividis"](np.linspace(0, 1, 256))[:, :3] * 255).astype(np.uint8)
    return base64.b64encode(table.tobytes()).decode()


def _note(levels: int, factor: int) -> str:
    if levels == 65534:
        error = "to 0.001% of the map's maximum"
    else:
        error = (
            f"to {100 / levels:.1g}% of the map's maximum or better, in {levels + 1} levels "
            "of a square-root scale"
        )
    cells = (
        "every query–key pair"
        if factor == 1
        else f"the largest of {factor} × {factor} pairs a cell (pooled)"
    )
    return f"The map shows {cells}; values are exact {error}."
