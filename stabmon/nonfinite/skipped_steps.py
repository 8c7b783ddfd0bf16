"""Count the optimizer steps in a row that were left out, and tell when they are no search for a
scale any more.
"""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon._torch.optimizer_adapter import OptimizerAdapter

_WAIT = 8
"""Steps of which a fused optimizer's word is left on the device before it is asked for."""


class SkippedSteps:
    """Steps in a row that were left out, by a gradient scaler or by the training loop.

    A scaler halves its scale at each. A search takes as many as bring its first scale to 1 (see
    :meth:`~stabmon._torch.grad_scaler.ScalerWatch.search_length`); one more, and what overflows is
    not its scale.
    """

    def __init__(self, view: OptimizerAdapter) -> None:
        self._view = view
        self.in_a_row = 0
        self.search = 0
        """Steps in a row that a search may take."""
        self._waiting: list[Tensor] = []
        self._first: float | None = None
        """The scale after the first of them."""
        self._bad = 0
        """Those of them with a loss or gradients that were seen to be bad."""
        self._told = 0

    @property
    def stuck(self) -> bool:
        """Whether it has been told that nothing is trained, and no step has been made since."""
        return self._told > 0

    def note(self, left_out: bool | Tensor, *, bad: bool) -> bool:
        """Take note of a step; whether that is news: more were left out than a search takes, or
        twice as many.

        Args:
            left_out: whether it was; a fused optimizer's word may stay on its device for some
                steps.
            bad: whether its loss or gradients were seen to be bad.
        """
        for flag in self._arrived(left_out):
            self.in_a_row = self.in_a_row + 1 if flag else 0
        if not self.in_a_row:
            self._first, self._told, self._bad = None, 0, 0
            return False
        self._bad += bad
        scale = self._view.scale() if self._first is None else None
        self._first = self._first if scale is None else scale
        self.search = self._view.scalers.search_length()
        due = min(2, self.in_a_row // (self.search + 1))
        if due <= self._told or not self._is_meant():
            return False
        self._told = due
        return True

    def _is_meant(self) -> bool:
        """Whether steps are left out for what is in them: the scale has fallen, or without a scaler
        they were seen to be bad. A loop that only accumulates gradients leaves steps out too."""
        scale = self._view.scale()
        if scale is None:
            return self._bad > self.search
        return self._first is not None and scale < self._first

    def _arrived(self, left_out: bool | Tensor) -> list[bool]:
        if isinstance(left_out, Tensor):
            self._waiting.append(left_out.detach())
            if left_out.device.type != "cpu" and len(self._waiting) < _WAIT:
                return []
        waiting = torch.stack(self._waiting).tolist() if self._waiting else []
        self._waiting = []
        flags = [value > 0 for value in waiting]
        return flags if isinstance(left_out, Tensor) else [*flags, left_out]
