"""The loss of each step, from whoever knows it, kept on its device until a reading needs it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabmon._storage.stored_value import Stored
from stabmon._torch.outputs import loss_in


class LossAccumulator:
    """Adds the losses of micro-batches up to a step's, and keeps those of the steps since the last
    reading.

    Args:
        keep: steps kept where no reading comes.
    """

    def __init__(self, keep: int) -> None:
        self.parts: list[Tensor] = []
        """This step's, one a micro-batch: as the training loop told them, else as found in the
        model's outputs.
        """
        self._told = False
        self._pending: deque[tuple[int, float | Tensor]] = deque(maxlen=keep)

    def tell(self, loss: Tensor) -> None:
        """Take a micro-batch's share of the step's loss from the training loop; shares are added
        up.
        """
        if not self._told:
            self._told, self.parts = True, []
        self.parts.append(loss.detach())

    def find(self, output: Any) -> None:
        """Take the loss out of a forward's output, unless the training loop tells it."""
        loss = None if self._told else loss_in(output)
        if loss is not None:
            self.parts.append(loss.detach())

    def end_step(
        self, step: int, loss: Tensor | float | None, shares: bool
    ) -> float | Tensor | None:
        """Close a step, with its ``loss`` where the loop has one. Found parts are added up if they
        are ``shares``, else averaged.

        Raises:
            ValueError: for a loss that is no single number.
        """
        if loss is None and self.parts:
            parts = torch.stack([part.float() for part in self.parts])
            loss = parts.sum() if shares or self._told else parts.mean()
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
        """Forget the parts of a step."""
        self.parts, self._told = [], False

    def take(self) -> tuple[tuple[int, float], ...]:
        """(step, loss) of every step since this was last called, brought to the host in one
        transfer.
        """
        pending, self._pending = list(self._pending), deque(maxlen=self._pending.maxlen)
        waiting = [value.double() for _, value in pending if isinstance(value, Tensor)]
        arrived = iter(torch.stack(waiting).tolist() if waiting else [])
        return tuple(
            (step, next(arrived) if isinstance(value, Tensor) else value) for step, value in pending
        )

    def state_dict(self) -> list[list[float]]:
        """The losses that no reading has had yet."""
        return [[step, float(value)] for step, value in self._pending]

    def parse_state(self, state: list[list[float]] | Stored) -> Callable[[], None]:
        """Read a state whole, and return what takes it up.

        Raises:
            ValueError: if it is no state of losses.
        """
        pairs = [each.parts(2) for each in Stored.of(state).parts()]
        pending = deque(
            ((step.integer(), loss.number()) for step, loss in pairs), maxlen=self._pending.maxlen
        )

        def take_up() -> None:
            self._pending = deque(pending, maxlen=pending.maxlen)

        return take_up


def _number(loss: Tensor | float) -> float:
    return loss.item() if isinstance(loss, Tensor) else float(loss)
