"""Sums over the keys of each row, from which every statistic follows: folded block by block, relative to the largest logit so far."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from stabmon.operator.visibility import HIDDEN

LN_2 = math.log(2)
RowSums = dict[str, Tensor]
"""What is known of some rows, all of one shape; logits are in bits, multiples of ln 2:

- ``top``, ``bottom``: largest and smallest logit; ``raw_top``, ``raw_bottom``: the same before a softcap.
- ``rest``: sum of e = exp2(logit - top) over all but one largest key.
- ``weighted``: sum of e * (logit - top).
- ``square``, ``cube``: sums of e^2 and e^3.
- ``first``: e of the first key.
"""
_LARGEST = ("top", "raw_top")
_SMALLEST = ("bottom", "raw_bottom")
LOWEST = -1e4
"""Distance below the row's maximum at which exp2 is 0 in every format; keeps 0 * -inf out of the sums."""

PARTS: dict[str, frozenset[str]] = {
    "log_partition": frozenset({"top", "rest"}),
    "log_partition_2": frozenset({"top", "rest", "square"}),
    "log_partition_3": frozenset({"top", "rest", "square", "cube"}),
    "mean_score": frozenset({"top", "rest", "weighted"}),
    "entropy": frozenset({"top", "rest", "weighted"}),
    "max_score": frozenset({"raw_top"}),
    "min_score": frozenset({"raw_bottom"}),
    "max_logit": frozenset({"top"}),
    "min_logit": frozenset({"bottom"}),
    "log_odds_of_rest": frozenset({"top", "rest"}),
    "first_key_mass": frozenset({"top", "rest", "first"}),
}
"""The sums that each statistic is made of."""


def nothing(parts: list[str], shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """``[len(parts), *shape]``: the sums of rows that have seen no key."""
    empty = dict.fromkeys(_LARGEST, HIDDEN) | dict.fromkeys(_SMALLEST, -HIDDEN) | {"rest": -1.0}
    values = torch.tensor([empty.get(part, 0.0) for part in parts], dtype=dtype, device=device)
    return values.view(-1, *[1] * len(shape)).repeat(1, *shape)


def fold(a: RowSums, b: RowSums) -> RowSums:
    """The sums over the keys of both, as far as both know them."""
    out = {name: torch.maximum(a[name], b[name]) for name in _LARGEST if name in a}
    out |= {name: torch.minimum(a[name], b[name]) for name in _SMALLEST if name in a}
    if "rest" not in a:
        return out
    shift_a, shift_b = ((x["top"] - out["top"]).clamp(min=LOWEST) for x in (a, b))
    factor_a, factor_b = shift_a.exp2(), shift_b.exp2()
    mass_a, mass_b = factor_a * (1 + a["rest"]), factor_b * (1 + b["rest"])
    out["rest"] = torch.where(a["top"] >= b["top"], a["rest"] + mass_b, b["rest"] + mass_a)
    for name, power in (("first", 1), ("weighted", 1), ("square", 2), ("cube", 3)):
        if name in a:
            out[name] = factor_a**power * a[name] + factor_b**power * b[name]
    if "weighted" in a:
        out["weighted"] += shift_a * mass_a + shift_b * mass_b
    return out


def finish(sums: RowSums, sinks: Tensor | None, statistics: set[str]) -> dict[str, Tensor]:
    """The statistics of rows that have seen all of their keys; ``sinks`` are learned logits that join each row's softmax."""
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
        for name, part, power in (("log_partition_2", "square", 2), ("log_partition_3", "cube", 3)):
            if part in sums:
                out[name] = power * top + sums[part].log()
        if "first" in sums:
            out["first_key_mass"] = sums["first"] / total
    return {name: out[name] for name in statistics}


def _with_sinks(sums: RowSums, sinks: Tensor) -> RowSums:
    zero, one = torch.zeros_like(sinks), torch.ones_like(sinks)
    alone = {"top": sinks / LN_2, "rest": zero, "weighted": zero, "square": one, "cube": one, "first": zero}
    return fold({name: value for name, value in sums.items() if name in alone}, alone)
