"""Multiply rows of parameters by factors, and take that back."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from stabmon._storage.stored_value import Stored
from stabmon.projections.head_rows import Rows
from stabmon.projections.master_weights import SteppedRun, copies_of


@dataclass(eq=False)
class _Scaled:
    """One row range of one tensor, with the factors that it was given."""

    rows: Rows
    tensor: Tensor
    original: Tensor | None
    """Its bits before the first factor; None once the optimizer has moved it."""
    factors: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """After which optimizer step each was given."""

    @property
    def product(self) -> float:
        """All factors together."""
        return math.prod(self.factors)


class ScaledRows:
    """Rows that were multiplied, each with all its copies.

    The optimizer's moments are left as they are. An adaptive step does not depend on the scale of
    its gradients, so the next step has the size it would have had; the momentum still points to
    where the scores grew, which is why a clip is held and not done once.
    """

    def __init__(self, run: SteppedRun) -> None:
        self.run = run
        self._entries: dict[tuple[Any, ...], _Scaled] = {}

    @torch.no_grad()
    def scale(self, edits: Iterable[tuple[Rows, float]]) -> None:
        """Multiply all of them, or none.

        Raises:
            NotApplicable: if a copy that the optimizer keeps, or the rows of a shard, cannot be
                found.
        """
        copies = [
            (rows, copy, factor)
            for rows, factor in edits
            for copy in copies_of(rows.parameter, self.run)
        ]
        todo = [(rows, copy, rows.view(copy), factor) for rows, copy, factor in copies]
        for rows, tensor, view, factor in todo:
            entry = self._entries.get((*rows.key, id(tensor)))
            if entry is None:
                entry = _Scaled(rows, tensor, view.clone())
                self._entries[(*rows.key, id(tensor))] = entry
            elif not self._is_untouched(entry):
                entry.original = None
            entry.factors.append(factor)
            entry.steps.append(self.run.step)
            _times(view, factor, rows.offset)

    def moved_on(self) -> None:
        """The optimizer has stepped: forget the bits of what it moved, which could no longer be put
        back.
        """
        for entry in self._entries.values():
            if entry.original is not None and not self._is_untouched(entry):
                entry.original = None

    @torch.no_grad()
    def undo(self) -> bool:
        """Put back the bits of before where nothing else has moved them, and divide the factors out
        where training has.

        Returns:
            Whether all bits are those of before.
        """
        exact = all(self._is_untouched(entry) for entry in self._entries.values())
        for entry in self._entries.values():
            if exact and entry.original is not None:
                entry.rows.view(entry.tensor).copy_(entry.original)
                continue
            _times(entry.rows.view(entry.tensor), 1 / entry.product, entry.rows.offset)
        self._entries = {}
        return exact

    def rolled_back(self, step: int) -> Callable[[], None]:
        """Forget the factors given after ``step``, which the restored weights do not hold; returns
        what brings them back.
        """
        before = self._entries
        self._entries = {}
        for key, entry in before.items():
            kept = [at for at, given in enumerate(entry.steps) if given <= step]
            if kept:
                factors, steps = (
                    [entry.factors[at] for at in kept],
                    [entry.steps[at] for at in kept],
                )
                self._entries[key] = _Scaled(entry.rows, entry.tensor, None, factors, steps)

        def restore() -> None:
            self._entries = before

        return restore

    def state(self, names: dict[int, str]) -> list[list[Any]]:
        """``[parameter name, dim, start, stop, offset, product of factors]`` of each range, masters
        left out.
        """
        out = []
        for entry in self._entries.values():
            if entry.tensor is entry.rows.parameter and id(entry.tensor) in names:
                rows = entry.rows
                out.append(
                    [
                        names[id(entry.tensor)],
                        rows.dim,
                        rows.start,
                        rows.stop,
                        rows.offset,
                        entry.product,
                    ]
                )
        return out

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """Take up what :meth:`state` told of; rows that are no longer there are left out."""
        parameters = dict(self.run.model.named_parameters())
        for name, dim, start, stop, offset, product in state:
            shape = parameters[name].shape if name in parameters else ()
            if dim < len(shape) and start < stop <= shape[dim]:
                rows = Rows(parameters[name], int(dim), int(start), int(stop), float(offset))
                for tensor in copies_of(rows.parameter, self.run):
                    self._entries[(*rows.key, id(tensor))] = _Scaled(
                        rows, tensor, None, [float(product)], [self.run.step]
                    )

    def _is_untouched(self, entry: _Scaled) -> bool:
        """Whether the rows hold what the factors made of the original, bit for bit."""
        if entry.original is None:
            return False
        expected = entry.original.clone()
        for factor in entry.factors:
            _times(expected, factor, entry.rows.offset)
        return torch.equal(expected, entry.rows.view(entry.tensor))


def check_saved_rows(saved: Stored) -> None:
    """Raise a ValueError where it is not what :meth:`ScaledRows.state` gives."""
    for each in saved.parts():
        name, dim, start, stop, offset, product = each.parts(6)
        _ = name.text(), dim.integer(), start.integer(), stop.integer(), offset.number()
        if not product.number() > 0:
            raise ValueError(f"{product.where} is {product.value}, not a factor above 0")


def _times(values: Tensor, factor: float, offset: float) -> None:
    """Change ``values`` so that ``offset + value`` is multiplied; in float32 where the offset would
    cost precision.
    """
    if offset:
        values.copy_((values.float() + offset) * factor - offset)
    else:
        values.mul_(factor)
