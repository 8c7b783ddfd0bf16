"""Count of optimizer steps that were skipped in a row."""

from __future__ import annotations

import torch
from torch import Tensor

from stabmon._torch.optimizer_adapter import OptimizerAdapter

_WAIT = 8
"""Steps after which a fused optimizer's flag is read from the device."""


class SkippedSteps:
    """Steps in a row that were skipped, by a gradient scaler or by the training loop.

    A scaler halves its scale at each. A search takes as many as bring its first scale to 1 (see
    :meth:`~stabmon._torch.grad_scaler.ScalerWatch.search_length`); one more, and what overflows is
    not its scale.

    Args:
        optimizer: the optimizers of the run and their scaler.
    """

    def __init__(self, optimizer: OptimizerAdapter) -> None:
        self._optimizer = optimizer
        self.in_a_row = 0
        self.search = 0
        """Steps in a row that a search may take."""
        self._waiting: list[Tensor] = []
        self._first: float | None = None
        """Scale after the first of them."""
        self._bad = 0
        """Number of them with a loss or gradients that were seen to be bad."""
        self._reported = 0

    @property
    def stuck(self) -> bool:
        """True if steps in a row were reported and none has been made since."""
        return self._reported > 0

    def note(self, left_out: bool | Tensor, *, bad: bool) -> bool:
        """Note a step, and return whether more were skipped than a search takes.

        Reported once, and once more at twice as many.

        Args:
            left_out: whether it was skipped; a fused optimizer's flag may stay on its device for
                some steps.
            bad: whether its loss or gradients were seen to be bad.
        """
        for flag in self._arrived(left_out):
            self.in_a_row = self.in_a_row + 1 if flag else 0
        if not self.in_a_row:
            self._first, self._reported, self._bad = None, 0, 0
            return False
        self._bad += bad
        scale = self._optimizer.scale() if self._first is None else None
        self._first = self._first if scale is None else scale
        self.search = self._optimizer.scalers.search_length()
        due = min(2, self.in_a_row // (self.search + 1))
        if due <= self._reported or not self._is_by_content():
            return False
        self._reported = due
        return True

    def _is_by_content(self) -> bool:
        """Return True if steps are skipped for bad values in them.

        The scale has fallen, or without a scaler they were seen to be bad. A loop that only
        accumulates gradients skips steps too.
        """
        scale = self._optimizer.scale()
        if scale is None:
            return self._bad > self.search
        return self._first is not None and scale < self._first

    def _arrived(self, left_out: bool | Tensor) -> list[bool]:
        """Return the flags of steps that are known by now."""
        if isinstance(left_out, Tensor):
            self._waiting.append(left_out.detach())
            if left_out.device.type != "cpu" and len(self._waiting) < _WAIT:
                return []
        waiting = torch.stack(self._waiting).tolist() if self._waiting else []
        self._waiting = []
        flags = [value > 0 for value in waiting]
        return flags if isinstance(left_out, Tensor) else [*flags, left_out]
