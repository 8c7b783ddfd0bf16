"""Notice at every step whether its loss, gradients and weights are finite, and find out once where a misfortune began."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture import clean_name
from stabmon.causes import of_values, of_weights
from stabmon.gradients import Sentinels, local
from stabmon.optimizer_view import OptimizerView
from stabmon.records import Cause, NonFinite
from stabmon.replay import ForwardCall, is_split
from stabmon.skipped_steps import SkippedSteps
from stabmon.trace import find_in_backward, find_in_forward, find_in_gradients, find_in_weights

_PATIENCE = 10
"""Finite steps in a row after which a misfortune is over; the next one is traced anew."""
_LOSS, _GRADIENTS = 1, 2
"""What a misfortune has reached; one that goes further is traced anew."""


class NonFiniteWatch:
    """Looks at a step's losses and a few of its gradients and weights, and replays the step's forwards when a misfortune begins.

    A misfortune lasts until enough steps in a row were finite, and is traced once, and once more where it goes further than the loss.
    One device synchronisation a step.

    Args:
        model: the model, as its forwards were recorded.
        on_error: told what failed in a replay: the place and the error.
        share: makes one finding out of those of all ranks; called where gradients, which DDP keeps equal on all, are bad.
        optimizer: tells of steps that were left out, and what it keeps of a parameter; None where it is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        on_error: Callable[[str, Exception], None],
        share: Callable[[NonFinite | None, int], NonFinite | None] | None = None,
        optimizer: OptimizerView | None = None,
    ) -> None:
        self._model = model
        self._on_error = on_error
        self._share = share
        self._view = optimizer or OptimizerView(None)
        self._skipped = SkippedSteps(self._view)
        self._sentinels: Sentinels | None = None
        self._found: NonFinite | None = None
        self._last_bad, self._reached = -math.inf, 0
        self._after: list[Tensor] = []
        """The largest value of a few weights after the last step, not yet brought to the host."""
        self._looked = self._bad_gradient = self._began = self._fine_before = self._no_gradient = False

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
            Whether a misfortune began here, or went further.
        """
        self._sentinels = self._sentinels or Sentinels(self._model)
        shown = self._sentinels.gradients() if gradients else []
        after, self._after = self._after, []
        largest = largest_of([*losses, *shown], after)
        fine = [math.isfinite(each) for each in largest]
        bad_loss = not all(fine[: len(losses)])
        graded = largest[len(losses) : len(losses) + len(shown)]
        bad_gradient = not all(map(math.isfinite, graded)) or (gradients and norm is not None and not math.isfinite(norm))
        bad_weights = not all(fine[len(losses) + len(shown) :])
        fine_before, self._fine_before = self._fine_before, not bad_gradient and not bad_weights
        self._looked, self._bad_gradient, self._no_gradient = True, bad_gradient, bool(graded) and not any(graded)
        if not bad_loss and not bad_gradient and not bad_weights:
            return False
        blamed = bad_weights and fine_before
        reached = _GRADIENTS if bad_gradient or bad_weights else _LOSS
        news = self._take(step, reached, lambda: self._trace(step, calls, bad_loss, bad_gradient, blamed))
        return (bad_weights and self._touch("weights")) or news

    def end_step(self, step: int, loss: float | None, calls: Sequence[ForwardCall], left_out: bool | Tensor) -> bool:
        """Take note of a step that is over, and how far a misfortune has come.

        Args:
            step: its number.
            loss: its loss, where that is known already.
            calls: its forwards.
            left_out: whether the optimizer did not make it, see :meth:`~stabmon.optimizer_view.OptimizerView.left_out`.

        Returns:
            Whether a misfortune began here, or went further.
        """
        looked, self._looked = self._looked, False
        bad_gradient, self._bad_gradient = self._bad_gradient, False
        news = False
        if loss is not None and not math.isfinite(loss) and self._last_bad != step:
            # what was left out has moved no weights, so that it can be replayed still
            trace = (
                (lambda: self._trace(step, calls, True, False, False)) if left_out is True else (lambda: self._told(step, loss))
            )
            news = self._take(step, _LOSS, trace)
        if bad_gradient and (self._found is None or self._found.touched != "weights"):
            left_out = True  # whoever steps, it was with other gradients than these
        if self._skipped.note(left_out, bad=self._last_bad == step):
            self._stuck(step, calls)
            news = True
        elif self._skipped.stuck:
            self._last_bad = step
        if self._began and self._last_bad == step:
            spoilt = self._spoilt()
            gradients = bad_gradient or left_out is not False or not looked and self._gradients_bad()
            self._touch("weights" if spoilt else "gradients" if gradients else "nothing")
        self._began = False
        self._after = self._largest_weights()
        return news

    def note_loss(self, step: int, loss: float) -> None:
        """Take note of a loss that is not finite, of a step that is over for some time; what was told of it already wins."""
        if self._last_bad < step:
            self._take(step, _LOSS, lambda: self._told(step, loss))
            self._touch("weights" if self._spoilt() else "nothing")
            self._began = False

    def state_dict(self) -> dict[str, Any]:
        """The present misfortune, as plain values."""
        if self._found is None:
            return {}
        return {"found": asdict(self._found), "last_bad": self._last_bad, "reached": self._reached}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken."""
        self._found = NonFinite(**state["found"]) if state else None
        self._last_bad = state["last_bad"] if state else -math.inf
        self._reached = state.get("reached", _GRADIENTS) if state else 0

    def _take(self, step: int, reached: int, trace: Callable[[], NonFinite]) -> bool:
        over = step - self._last_bad > _PATIENCE
        begins = over or reached > self._reached
        self._last_bad, self._reached = step, reached if over else max(reached, self._reached)
        if begins:
            self._found, self._began = trace(), True
        return begins

    def _touch(self, what: Any) -> bool:
        """Note how far it has come; whether that is further than before."""
        if self._found is None or _FURTHER.index(self._found.touched) >= _FURTHER.index(what):
            return False
        self._found = replace(self._found, touched=what)
        return True

    def _stuck(self, step: int, calls: Sequence[ForwardCall]) -> None:
        """More steps in a row were left out than a search takes: nothing is trained."""
        going_on = self._found is not None and self._found.touched != "nothing" and step - self._last_bad <= _PATIENCE
        if self._found is None or not going_on:
            self._no_gradient = False
            self._found, self._began = self._trace(step, calls, False, True, False, _STUCK), True
        self._last_bad, self._reached = step, _GRADIENTS
        at = {"skipped": self._skipped.in_a_row, "search": self._skipped.search, "scale": self._view.scale()}
        self._found = replace(self._found, **at)  # type: ignore[arg-type]
        self._touch("gradients")

    def _told(self, step: int, loss: float) -> NonFinite:
        """A loss of which only the number is known: its gradients were finite, or nobody could look."""
        if self._no_gradient:
            return NonFinite(step, "loss", None, None, "loss", f"loss is {loss}, and every gradient is 0", "labels")
        return NonFinite(step, "loss", None, None, "loss", f"loss is {loss}", "objective")

    def _trace(
        self,
        step: int,
        calls: Sequence[ForwardCall],
        bad_loss: bool,
        bad_gradient: bool,
        blamed: bool,
        untraced: tuple[str, str] | None = None,
    ) -> NonFinite:
        found, replayed = None, bool(calls) and not is_split(self._model)
        if replayed:
            found = self._replay(find_in_forward, calls, step)
            if found is None and not bad_loss:
                found = self._replay(find_in_backward, calls, step)
        if found is None and blamed:
            found = find_in_weights(self._model, step)
        if found is not None and found.kind == "parameter":
            found = self._who_made(found, blamed)
        found = found or self._outside(step, replayed, bad_loss, untraced or _UNTRACED[bad_loss])
        if self._share is not None and bad_gradient:
            try:
                found = self._share(found, step) or found
            except Exception as error:
                self._on_error("share", error)
        return found

    def _outside(self, step: int, replayed: bool, bad_loss: bool, untraced: tuple[str, str]) -> NonFinite:
        """What is bad though the model's own forward and backward are finite, or could not be made again."""
        found = find_in_gradients(self._model, step)
        if found is not None:
            formats = [
                of_values(p.grad) for p in self._model.parameters() if p.grad is not None and p.grad.dtype == torch.float16
            ]
            return replace(found, cause="overflow" if "overflow" in formats else "objective" if replayed else "")
        tensor, detail = untraced
        if bad_loss and self._no_gradient:
            return NonFinite(step, "loss", None, None, tensor, "every gradient is 0", "labels")
        cause: Cause = "objective" if replayed else ""
        return NonFinite(step, "loss" if bad_loss else "gradient", None, None, tensor, detail, cause)

    def _who_made(self, found: NonFinite, blamed: bool) -> NonFinite:
        """Whether a parameter became what it is in the optimizer's step on finite gradients."""
        for name, parameter in self._model.named_parameters():
            layer, _, tensor = name.rpartition(".")
            if tensor == found.tensor and (clean_name(layer) or type(self._model).__name__) == found.layer:
                cause, why = of_weights(parameter, self._view.scalers.optimizers)
                if cause == "optimizer" or why:
                    return replace(found, cause=cause, detail=f"{found.detail}; {why}")
                break
        if blamed:
            why = f"finite before step {found.step - 1}, as were the gradients that were looked at"
            return replace(found, cause="optimizer", detail=f"{found.detail}; {why}")
        return found

    def _replay(
        self, find: Callable[[nn.Module, Sequence[ForwardCall], int], NonFinite | None], calls: Sequence[ForwardCall], step: int
    ) -> NonFinite | None:
        try:
            return find(self._model, calls, step)
        except Exception as error:
            self._on_error("replay", error)
            return None

    def _spoilt(self) -> bool:
        """Whether any parameter, or running statistic, holds what is not finite; -inf in a buffer may hide keys."""
        weights = [local(each.detach()) for each in self._model.parameters() if _may_be_bad(each)]
        statistics = [local(each) for each in self._model.buffers() if _may_be_bad(each)]
        largest = largest_of([*weights, *statistics])
        return not all(map(math.isfinite, largest[: len(weights)])) or any(map(math.isnan, largest[len(weights) :]))

    def _gradients_bad(self) -> bool:
        """Whether gradients that are still there are bad; without an optimizer nobody could look before its step."""
        shown = Sentinels(self._model).gradients()
        return not all(map(math.isfinite, largest_of(shown)))

    @torch.no_grad()
    def _largest_weights(self) -> list[Tensor]:
        """Of a few weights; waits for no device."""
        if self._sentinels is None:
            return []
        weights = [weight for weight in self._sentinels.weights() if weight.numel()]
        return list(torch._foreach_norm(weights, math.inf)) if weights else []


def _may_be_bad(tensor: Tensor) -> bool:
    """Whether a tensor is of a format that holds inf; quantised weights are of none."""
    return tensor.is_floating_point() and tensor.element_size() > 1


_FURTHER = ("", "nothing", "gradients", "weights")
_STUCK = "gradients", "not finite at any scale, though those of the model alone were finite when its forwards were replayed"
_UNTRACED = {
    True: ("loss", "all was finite when the forwards were replayed"),
    False: ("gradient norm", "every gradient is finite, but not their norm"),
}


@torch.no_grad()
def largest_of(tensors: Sequence[Tensor], largest: Sequence[Tensor] = ()) -> list[float]:
    """The largest absolute value of each tensor, NaN where one is; then the numbers ``largest``. One transfer to the host."""
    if any(not tensor.numel() for tensor in tensors):  # shards can be empty, and have no largest value
        tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    found = [*(torch._foreach_norm(list(tensors), math.inf) if tensors else ()), *largest]
    if not found:
        return []
    device = found[0].device
    values: list[float] = torch.stack([each.to(device) for each in found]).tolist()
    return values
