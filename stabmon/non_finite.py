"""Notice at every step whether its loss and gradients are finite, and find out once where a misfortune began."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.gradients import Sentinels
from stabmon.records import NonFinite
from stabmon.replay import ForwardCall, is_split
from stabmon.stored import Stored, stored_non_finite
from stabmon.trace import find_in_backward, find_in_forward, find_in_gradients

_PATIENCE = 10
"""Finite steps in a row after which a misfortune is over; the next one is traced anew."""


class NonFiniteWatch:
    """Looks at a step's losses and a few of its gradients, and replays the step's forwards when a misfortune begins.

    A misfortune lasts until enough steps in a row were finite, and is traced once. One device synchronisation a step.

    Args:
        model: the model, as its forwards were recorded.
        on_error: told what failed in a replay: the place and the error.
        share: makes one finding out of those of all ranks; called where gradients, which DDP keeps equal on all, are bad.
    """

    def __init__(
        self,
        model: nn.Module,
        on_error: Callable[[str, Exception], None],
        share: Callable[[NonFinite | None, int], NonFinite | None] | None = None,
    ) -> None:
        self._model = model
        self._on_error = on_error
        self._share = share
        self._sentinels: Sentinels | None = None
        self._found: NonFinite | None = None
        self._last_bad = -math.inf

    def found_since(self, step: int | float) -> NonFinite | None:
        """Where the present misfortune began, if it showed after ``step``."""
        return self._found if self._last_bad > step else None

    def look(
        self, step: int, calls: Sequence[ForwardCall], losses: Sequence[Tensor], gradients: bool, norm: float | None
    ) -> bool:
        """Look at a step before the optimizer makes it.

        Args:
            step: its number.
            calls: its forwards.
            losses: those of its micro-batches, as far as they are known.
            gradients: whether to look at gradients; a gradient scaler meets bad ones daily, and skips the step by itself.
            norm: the norm of all gradients, where it has been computed.

        Returns:
            Whether a misfortune began here.
        """
        self._sentinels = self._sentinels or Sentinels(self._model)
        shown = self._sentinels.gradients() if gradients else []
        fine = all_finite([*losses, *shown])
        bad_loss, bad_gradient = not all(fine[: len(losses)]), not all(fine[len(losses) :])
        bad_gradient = bad_gradient or (gradients and norm is not None and not math.isfinite(norm))
        if not bad_loss and not bad_gradient:
            return False
        return self._take(step, lambda: self._trace(step, calls, bad_loss, bad_gradient))

    def note_loss(self, step: int, loss: float) -> bool:
        """Take note of a finished step's loss that is not finite; nothing can be replayed any more."""
        return self._take(step, lambda: NonFinite(step, "loss", None, None, "loss", f"loss is {loss}"))

    def state_dict(self) -> dict[str, Any]:
        """The present misfortune, as plain values."""
        if self._found is None:
            return {}
        return {"found": asdict(self._found), "last_bad": self._last_bad}

    def parse_state(self, state: Mapping[str, Any] | Stored) -> Callable[[], None]:
        """Read a state whole, and return what takes it up.

        Raises:
            ValueError: if it is no state of a watch.
        """
        saved = Stored.of(state)
        found = stored_non_finite(saved["found"]) if saved.mapping() else None
        last_bad = saved["last_bad"].integer() if saved.mapping() else -math.inf

        def take_up() -> None:
            self._found, self._last_bad = found, last_bad

        return take_up

    def _take(self, step: int, trace: Callable[[], NonFinite]) -> bool:
        begins = step - self._last_bad > _PATIENCE
        self._last_bad = step
        if begins:
            self._found = trace()
        return begins

    def _trace(self, step: int, calls: Sequence[ForwardCall], bad_loss: bool, bad_gradient: bool) -> NonFinite:
        found = None
        if not is_split(self._model):
            found = self._replay(find_in_forward, calls, step)
            if found is None and not bad_loss:
                found = self._replay(find_in_backward, calls, step)
        found = found or find_in_gradients(self._model, step)
        if self._share is not None and bad_gradient:
            try:
                found = self._share(found, step)
            except Exception as error:
                self._on_error("share", error)
        return found or NonFinite(step, "loss" if bad_loss else "gradient", None, None, *_UNTRACED[bad_loss])

    def _replay(
        self, find: Callable[[nn.Module, Sequence[ForwardCall], int], NonFinite | None], calls: Sequence[ForwardCall], step: int
    ) -> NonFinite | None:
        try:
            return find(self._model, calls, step)
        except Exception as error:
            self._on_error("replay", error)
            return None


_UNTRACED = {
    True: ("loss", "all was finite when the forwards were replayed: look at the loss function"),
    False: ("gradient norm", "every gradient is finite, but not their norm"),
}


def all_finite(tensors: Sequence[Tensor]) -> list[bool]:
    """Whether each tensor is finite throughout; one transfer to the host."""
    if any(not tensor.numel() for tensor in tensors):  # shards can be empty, and have no largest value
        tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    if not tensors:
        return []
    with torch.no_grad():
        largest = torch._foreach_norm(list(tensors), math.inf)
        device = largest[0].device
        return [math.isfinite(value) for value in torch.stack([each.to(device) for each in largest]).tolist()]
