"""Gains of norms behind which queries and keys lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import nn

from stabmon._torch.snippets import QK_NORM
from stabmon.projections.head_rows import QueryKey, Rows
from stabmon.projections.not_applicable import NotApplicable


def behind_norm(
    name: str, norm: nn.Module, heads: int, width: int, others: Sequence[Rows]
) -> QueryKey:
    """Return the proposal that scores are proportional to a norm's gain (and bias).

    Behind a norm the weights no longer matter.

    Args:
        name: name of the norm, for messages.
        norm: the norm, or a module that holds one for each head.
        heads: query heads.
        width: head dimension.
        others: further rows that make queries and keys.

    Raises:
        NotApplicable: if the norm has no trained gain of a known shape.
    """
    parts = [norm]
    stacked = getattr(norm, "norms", None)
    if isinstance(stacked, nn.ModuleList) and len(stacked) == heads:
        parts = list(stacked)
    rows: list[list[Rows]] = []
    for part in parts:
        whole = gain_and_bias(part)
        if not whole:
            raise NotApplicable(
                f"{name} ({type(norm).__name__}) has no gain that could be lowered", QK_NORM
            )
        if any(not each.parameter.requires_grad for each in whole):
            raise NotApplicable(f"{name} is frozen: it is not what grew")
        rows.append([replace(each, offset=_offset(part, each.parameter)) for each in whole])
    gain = rows[0][0].parameter
    if len(parts) == heads:
        return QueryKey(f"gain of {name}, one norm a head", rows, others=others)
    if tuple(gain.shape) == (heads, width):
        size = 1
    elif gain.numel() == heads * width and gain.ndim == 1:
        size = width
    elif gain.numel() == width:
        how = f"gain of {name}, which all heads of the layer share"
        return QueryKey(how, [rows[0]] * heads, shared=True, others=others)
    else:
        raise NotApplicable(
            f"{name} has a gain of shape {tuple(gain.shape)}, which fits neither {heads} heads "
            f"nor {width} features"
        )
    per_head = [
        [replace(each, start=h * size, stop=(h + 1) * size) for each in rows[0]]
        for h in range(heads)
    ]
    return QueryKey(f"gain of {name}", per_head, others=others)


def gain_and_bias(norm: nn.Module) -> list[Rows]:
    """Return gain and bias of a norm."""
    found = [getattr(norm, name, None) for name in ("weight", "gain", "gamma", "bias", "beta")]
    return [
        Rows(each, 0, 0, each.shape[0])
        for each in found
        if isinstance(each, nn.Parameter) and each.ndim > 0
    ]


def _offset(norm: nn.Module, parameter: nn.Parameter) -> float:
    """Return 0 where a norm multiplies by its gain, 1 where by one plus its gain.

    Found by running it on a fixed input.

    Raises:
        NotApplicable: if its output is proportional to neither.
    """
    trained = dict(norm.named_parameters(recurse=False))
    name = next(name for name, each in trained.items() if each is parameter)
    if name in ("bias", "beta"):
        return 0.0
    device = parameter.device
    probe = torch.linspace(-1.0, 1.5, parameter.numel(), device=device).reshape(parameter.shape)
    start = {
        n: torch.linspace(0.3, 0.9, each.numel(), device=device).reshape(each.shape)
        for n, each in trained.items()
    }
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        before = torch.func.functional_call(norm, start, (probe,))
        for offset in (0.0, 1.0):
            halved = {
                n: (each + offset) / 2 - offset if n == name else each / 2
                for n, each in start.items()
            }
            after = torch.func.functional_call(norm, halved, (probe,))
            if torch.allclose(2 * after, before, rtol=1e-4, atol=1e-6):
                return offset
    raise NotApplicable(f"{type(norm).__name__}'s output is not proportional to its gain")
