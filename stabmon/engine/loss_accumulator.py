"""Keep the loss of each step on its device until a reading needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabmon._storage.stored_value import Stored
from stabmon._torch.outputs import loss_in


class LossAccumulator:
    """Losses of a step's micro-batches, and of the steps since the last reading.

    Args:
        keep: number of steps kept where no reading drains them.

    Example:
        >>> losses = LossAccumulator(keep=10)
        >>> losses.add_reported(torch.tensor(1.0))
        >>> losses.add_reported(torch.tensor(2.0))
        >>> losses.end_step(1, None, shares=True)
        3.0
        >>> losses.drain()
        ((1, 3.0),)
    """

    def __init__(self, keep: int) -> None:
        self.parts: list[Tensor] = []
        """Scalar losses of this step's micro-batches.

        They are those that the training loop reported, else those found in the model's outputs.
        """
        self._reported = False
        self._pending: deque[tuple[int, float | Tensor]] = deque(maxlen=keep)

    def add_reported(self, loss: Tensor) -> None:
        """Add a micro-batch's share of the step's loss, as the training loop reports it."""
        if not self._reported:
            self._reported, self.parts = True, []
        self.parts.append(loss.detach())

    def add_from_output(self, output: Any) -> None:
        """Add the loss in a forward's output, unless the training loop reports losses."""
        loss = None if self._reported else loss_in(output)
        if loss is not None:
            self.parts.append(loss.detach())

    def end_step(
        self, step: int, loss: Tensor | float | None, shares: bool
    ) -> float | Tensor | None:
        """Close a step.

        Args:
            step: the step that has ended.
            loss: its loss, where the training loop has one; else its parts make it.
            shares: parts found in outputs are shares of the step's loss and are added up; else they
                are averaged. Reported parts are always added up.

        Returns:
            The loss; a tensor where reading it would wait for a device; None where none is known.

        Raises:
            ValueError: for a loss that is no single number.
        """
        if loss is None and self.parts:
            parts = torch.stack([part.float() for part in self.parts])
            loss = parts.sum() if shares or self._reported else parts.mean()
        self.start_step()
        if loss is None:
            return None
        if isinstance(loss, Tensor) and loss.numel() != 1:
            raise ValueError(
                f"loss has shape {list(loss.shape)}: give on_step a single number, such as "
                "loss.mean()"
            )
        on_device = isinstance(loss, Tensor) and loss.device.type != "cpu"
        value = (
            loss.detach().reshape(()) if isinstance(loss, Tensor) and on_device else _number(loss)
        )
        self._pending.append((step, value))
        return value

    def start_step(self) -> None:
        """Drop the parts of a step."""
        self.parts, self._reported = [], False

    def drain(self) -> tuple[tuple[int, float], ...]:
        """Return (step, loss) of every step since the last call, in one transfer."""
        pending, self._pending = list(self._pending), deque(maxlen=self._pending.maxlen)
        waiting = [value.double() for _, value in pending if isinstance(value, Tensor)]
        arrived = iter(torch.stack(waiting).tolist() if waiting else [])
        return tuple(
            (step, next(arrived) if isinstance(value, Tensor) else value) for step, value in pending
        )

    def state_dict(self) -> list[list[float]]:
        """Return the losses that no reading has had yet."""
        return [[step, float(value)] for step, value in self._pending]

    def parse_state(self, state: list[list[float]] | Stored) -> Callable[[], None]:
        """Read a state whole, and return a function that restores it.

        Raises:
            ValueError: if it is no state of losses.
        """
        pairs = [each.parts(2) for each in Stored.of(state).parts()]
        pending = deque(
            ((step.integer(), loss.number()) for step, loss in pairs), maxlen=self._pending.maxlen
        )

        def restore() -> None:
            self._pending = deque(pending, maxlen=pending.maxlen)

        return restore


def _number(loss: Tensor | float) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)
