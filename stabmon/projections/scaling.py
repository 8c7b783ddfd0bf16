"""Rows of parameters multiplied by factors, and the way back."""

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
    """Bits before the first factor; None once the optimizer has moved it."""
    factors: list[float] = field(default_factory=list)
    steps: list[int] = field(default_factory=list)
    """Optimizer step after which each factor was given."""

    @property
    def product(self) -> float:
        """Product of all factors."""
        return math.prod(self.factors)


class ScaledRows:
    """Rows that were multiplied, each with all its copies.

    The optimizer's moments are left as they are. An adaptive step does not depend on the scale of
    its gradients, so the next step has the size it would have had; the momentum still points to
    where the scores grew, which is why a clip is held and not done once.

    Args:
        run: the model with its optimizers.
    """

    def __init__(self, run: SteppedRun) -> None:
        self.run = run
        self._entries: dict[tuple[Any, ...], _Scaled] = {}

    @torch.no_grad()
    def scale(self, edits: Iterable[tuple[Rows, float]]) -> None:
        """Multiply all of them, or none.

        Args:
            edits: rows and their factors.

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
        """Note a step of the optimizer; what it moved cannot be restored bit for bit."""
        for entry in self._entries.values():
            if entry.original is not None and not self._is_untouched(entry):
                entry.original = None

    @torch.no_grad()
    def undo(self) -> bool:
        """Restore the original bits; divide the factors out where training has moved on.

        Returns:
            True if all bits are the original ones.
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
        """Drop the factors given after ``step``, which the restored weights do not hold.

        Returns:
            A function that brings them back.
        """
        before = self._entries
        self._entries = {}
        for key, entry in before.items():
            kept = [at for at, given in enumerate(entry.steps) if given <= step]
            if kept:
                factors = [entry.factors[at] for at in kept]
                steps = [entry.steps[at] for at in kept]
                self._entries[key] = _Scaled(entry.rows, entry.tensor, None, factors, steps)

        def restore() -> None:
            self._entries = before

        return restore

    def state(self, names: dict[int, str]) -> list[list[Any]]:
        """Return ``[parameter name, dim, start, stop, offset, product]`` of each range.

        Masters are left out.

        Args:
            names: name of each parameter, by its ``id``.
        """
        out = []
        for entry in self._entries.values():
            if entry.tensor is entry.rows.parameter and id(entry.tensor) in names:
                rows, name = entry.rows, names[id(entry.tensor)]
                where = [rows.dim, rows.start, rows.stop, rows.offset]
                out.append([name, *where, entry.product])
        return out

    def load(self, state: Sequence[Sequence[Any]]) -> None:
        """Continue from a value of :meth:`state`; rows that no longer exist are left out."""
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
        """Return True if the rows are bit for bit the original times the factors."""
        if entry.original is None:
            return False
        expected = entry.original.clone()
        for factor in entry.factors:
            _times(expected, factor, entry.rows.offset)
        return torch.equal(expected, entry.rows.view(entry.tensor))


def check_saved_rows(saved: Stored) -> None:
    """Check that a stored value is one of :meth:`ScaledRows.state`.

    Raises:
        ValueError: if it is not.
    """
    for each in saved.parts():
        name, dim, start, stop, offset, product = each.parts(6)
        _ = name.text(), dim.integer(), start.integer(), stop.integer(), offset.number()
        if not product.number() > 0:
            raise ValueError(f"{product.where} is {product.value}, not a factor above 0")


def _times(values: Tensor, factor: float, offset: float) -> None:
    """Multiply ``offset + value`` in place, in float32 where there is an offset.

    The offset would cost precision otherwise.
    """
    if offset:
        values.copy_((values.float() + offset) * factor - offset)
    else:
        values.mul_(factor)
