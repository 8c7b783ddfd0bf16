"""Sums over the keys of each row, from which every statistic follows.

They are folded block by block, relative to the largest logit so far.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabmon.operator.visibility.pieces import HIDDEN

LN_2 = math.log(2)
RowSums = dict[str, Tensor]
"""Sums of some rows, all of one shape; logits are in bits, multiples of ln 2.

- ``top``, ``bottom``: largest and smallest logit.
- ``raw_top``, ``raw_bottom``: the same before a softcap.
- ``rest``: sum of e = exp2(logit - top) over all but one largest key.
- ``weighted``: sum of e * (logit - top).
- ``square_rest``, ``cube_rest``: sums of e^2 and e^3 over the same keys.
- ``first``: e of the first key.
"""
_LARGEST = ("top", "raw_top")
_SMALLEST = ("bottom", "raw_bottom")
_RESTS = {"rest": 1, "square_rest": 2, "cube_rest": 3}
"""Power of e in each sum; with the largest key's 1, a row without keys sums to 0."""
LOWEST = -1e4
"""Distance below the row's maximum at which exp2 is 0 in every format.

It keeps 0 * -inf out of the sums.
"""

PARTS: dict[str, frozenset[str]] = {
    "log_partition": frozenset({"top", "rest"}),
    "log_partition_2": frozenset({"top", "rest", "square_rest"}),
    "log_partition_3": frozenset({"top", "rest", "square_rest", "cube_rest"}),
    "mean_score": frozenset({"top", "rest", "weighted"}),
    "entropy": frozenset({"top", "rest", "weighted"}),
    "collision": frozenset({"top", "rest", "square_rest"}),
    "jacobian_norm": frozenset({"top", "rest", "square_rest", "cube_rest"}),
    "max_score": frozenset({"raw_top"}),
    "min_score": frozenset({"raw_bottom"}),
    "max_logit": frozenset({"top"}),
    "min_logit": frozenset({"bottom"}),
    "log_odds_of_rest": frozenset({"top", "rest"}),
    "first_key_mass": frozenset({"top", "rest", "first"}),
}
"""Sums that each statistic is made of."""


def sums_of_no_key(
    parts: list[str], shape: torch.Size, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return the sums of rows without keys.

    Args:
        parts: names of the sums.
        shape: of the rows.
        dtype: of the result.
        device: of the result.

    Returns:
        ``[len(parts), *shape]``.
    """
    empty = (
        dict.fromkeys(_LARGEST, HIDDEN)
        | dict.fromkeys(_SMALLEST, -HIDDEN)
        | dict.fromkeys(_RESTS, -1.0)
    )
    sums = torch.empty(len(parts), *shape, dtype=dtype, device=device)
    for part, rows in zip(parts, sums, strict=True):
        rows.fill_(empty.get(part, 0.0))  # numbers from the host would make it wait for the device
    return sums


def fold(a: RowSums, b: RowSums) -> RowSums:
    """Return the sums over the keys of both, as far as both have them."""
    out = {name: torch.maximum(a[name], b[name]) for name in _LARGEST if name in a}
    out |= {name: torch.minimum(a[name], b[name]) for name in _SMALLEST if name in a}
    if "rest" not in a:
        return out
    shift_a, shift_b = ((x["top"] - out["top"]).clamp(min=LOWEST) for x in (a, b))
    factor_a, factor_b = shift_a.exp2(), shift_b.exp2()
    for name, power in _RESTS.items():
        if name in a:
            mass_a, mass_b = factor_a**power * (1 + a[name]), factor_b**power * (1 + b[name])
            out[name] = torch.where(a["top"] >= b["top"], a[name] + mass_b, b[name] + mass_a)
    for name in ("first", "weighted"):
        if name in a:
            out[name] = factor_a * a[name] + factor_b * b[name]
    if "weighted" in a:
        out["weighted"] += shift_a * factor_a * (1 + a["rest"]) + shift_b * factor_b * (
            1 + b["rest"]
        )
    return out


def finish(sums: RowSums, sinks: Tensor | None, statistics: set[str]) -> dict[str, Tensor]:
    """Return the statistics of rows from the sums over all of their keys.

    Args:
        sums: of one shape.
        sinks: learned logits of that shape that join each row's softmax, or None.
        statistics: names whose parts ``sums`` holds.
    """
    top = sums["top"] * LN_2
    out = {"max_logit": top, "max_score": sums["raw_top"] * LN_2 if "raw_top" in sums else top}
    if "bottom" in sums:
        out["min_logit"] = out["min_score"] = sums["bottom"] * LN_2
    if "raw_bottom" in sums:
        out["min_score"] = sums["raw_bottom"] * LN_2
    if "rest" in sums:
        out["log_odds_of_rest"] = sums["rest"].log()
        if sinks is not None:
            out["log_odds_of_rest"] = torch.logaddexp(out["log_odds_of_rest"], sinks - top)
            sums = _with_sinks(sums, sinks)
            top = sums["top"] * LN_2
        log_total, total = sums["rest"].log1p(), sums["rest"] + 1
        out["log_partition"] = top + log_total
        if "weighted" in sums:
            mean = sums["weighted"] / total * LN_2
            out |= {"mean_score": top + mean, "entropy": (log_total - mean).clamp(min=0)}
        if "square_rest" in sums:
            out["log_partition_2"] = 2 * top + sums["square_rest"].log1p()
            out["collision"] = (1 + sums["square_rest"]) / total.square()
        if "cube_rest" in sums:
            out["log_partition_3"] = 3 * top + sums["cube_rest"].log1p()
            out["jacobian_norm"] = _jacobian_norm(
                sums["rest"], sums["square_rest"], sums["cube_rest"]
            )
        if "first" in sums:
            out["first_key_mass"] = sums["first"] / total
    return {name: out[name] for name in statistics}


def _jacobian_norm(rest: Tensor, square: Tensor, cube: Tensor) -> Tensor:
    """Compute the root of sum p^2 - 2 sum p^3 + (sum p^2)^2 with p = e / (1 + rest).

    The largest key's terms cancel on paper, and the others are no difference of near equals, so
    that a saturated row keeps its digits.
    """
    squared = (
        rest.square() * (1 + square)
        + 3 * square
        + 2 * rest * (square - cube)
        - 2 * cube
        + square.square()
    )
    return squared.clamp(min=0).sqrt() / (1 + rest).square()


def _with_sinks(sums: RowSums, sinks: Tensor) -> RowSums:
    alone = {
        "top": sinks / LN_2,
        **dict.fromkeys(("weighted", "first", *_RESTS), torch.zeros_like(sinks)),
    }
    return fold({name: value for name, value in sums.items() if name in alone}, alone)
