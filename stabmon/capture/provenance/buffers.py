"""Scores and weights written into part of another tensor."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from stabmon.capture.function_mode import modes_off
from stabmon.capture.provenance.axes import Axes, covers, is_advanced
from stabmon.capture.provenance.cells import Cells, written
from stabmon.capture.provenance.products import ScoreProvenance, is_number, step
from stabmon.capture.provenance.weights import Weights, united


def after_set_item(
    target: Tensor, index: Any, value: Any, own: Any, given: Any
) -> ScoreProvenance | Weights | None:
    """Return what is known of ``target`` after ``target[index] = value``.

    Args:
        target: the tensor that was written.
        index: the part of it.
        value: the values written.
        own: the record of ``target`` until then.
        given: the record of ``value``.
    """
    if isinstance(given, Weights):
        axes = axes_written(target, index, value, given.axes)
        return united([given, own], axes) if axes is not None else None
    if isinstance(own, Weights) or not (
        isinstance(own, ScoreProvenance) or isinstance(given, ScoreProvenance)
    ):
        return own if isinstance(own, Weights) else None

    def put(whole: Tensor, new: Tensor) -> None:
        whole[index] = new

    if not isinstance(given, ScoreProvenance):
        after = step("setitem", own, [value]) if is_number(value) else own.opaque()
        cells = written(target.shape, target.device, own.cells, put, everywhere(target.device))
        return None if after is None else replace(after, cells=cells, masked=True)
    known = own if isinstance(own, ScoreProvenance) else None
    axes = axes_written(target, index, value, given.axes)
    if known is not None:
        axes = known.axes if axes is None else known.axes | axes
    if axes is None or given.shift is not None or (known is not None and known.shift is not None):
        return None
    cells = written(
        target.shape, target.device, None if known is None else known.cells, put, given.cells
    )
    return replace(given.opaque(), axes=axes, cells=cells, masked=True, pieces=())


def everywhere(device: torch.device) -> Cells:
    """Return all cells."""
    return lambda: torch.ones((), dtype=torch.bool, device=device)


def axes_written(target: Tensor, index: Any, value: Tensor, axes: Axes) -> Axes | None:
    """Return the axes of ``target`` after ``target[index] = value``."""
    if is_advanced(index):
        return axes if value.ndim == target.ndim else None
    with modes_off():
        probe = torch.empty(target.shape, device="meta")
        part = probe[index]
    more = part.ndim - value.ndim
    if more < 0:
        return None
    return onto(probe, part, axes.at(lambda d: d + more))


def onto(whole: Tensor, part: Tensor, axes: Axes) -> Axes:
    """Return the axes of a contiguous tensor from those of its view ``part``."""
    place = [covers(whole, part.stride(d), part.shape[d]) for d in range(part.ndim)]
    return Axes(
        *(frozenset(d for v in some for d in place[v]) for some in (axes.rows, axes.columns))
    )


def base_after_write(
    view: Tensor, record: ScoreProvenance, base: Tensor, own: Any, *, filled: bool
) -> ScoreProvenance | None:
    """Return what is known of a tensor after a view of it was written.

    Args:
        view: the part that was written.
        record: what is known of it now.
        base: the tensor that it is a view of.
        own: the record of ``base`` until then.
        filled: whether the view was masked, not written anew.
    """
    known = own if isinstance(own, ScoreProvenance) else None
    if own is not known or not base.is_contiguous() or not base.is_floating_point():
        return None
    if record.shift is not None or (known is not None and known.shift is not None):
        return None
    geometry = view.shape, view.stride(), view.storage_offset() - base.storage_offset()

    def put(whole: Tensor, new: Tensor) -> None:
        whole.as_strided(*geometry).copy_(new)

    axes = onto(base, view, record.axes)
    cells = written(
        base.shape, base.device, None if known is None else known.cells, put, record.cells
    )
    same = known if known is not None and filled else (known or record).opaque()
    axes = axes if known is None else known.axes | axes
    return replace(same, axes=axes, cells=cells, masked=True, fills=same.fills + record.fills)
