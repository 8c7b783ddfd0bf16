"""Origin and cause of a NaN or an inf."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stabmon._torch.forward_call import ForwardCall, is_split
from stabmon._torch.tensors import local
from stabmon.capture import clean_name
from stabmon.nonfinite.causes import of_values, of_weights
from stabmon.nonfinite.first_bad_gradient import find_in_backward, find_in_gradients
from stabmon.nonfinite.first_bad_tensor import find_in_forward, find_in_weights
from stabmon.records import Cause, NonFinite


@dataclass(frozen=True)
class Seen:
    """Evidence that a step is bad."""

    loss: bool = False
    """A loss is not finite."""
    gradient: bool = False
    """A gradient, or the norm of all, is not finite."""
    after_step: bool = False
    """Weights are not finite right after the last step, whose gradients were."""
    no_gradient: bool = False
    """Every gradient that was checked is exactly 0."""
    at_any_scale: bool = False
    """Gradients are not finite at every scale that a gradient scaler has tried."""


class Tracer:
    """Origin of a bad step: a replay, then its gradients and the optimizer's state.

    To be used while parameters are those of the failing forward.

    Args:
        model: the model, as its forwards were recorded.
        on_error: called with the place and the error where a replay fails.
        share: makes one finding out of those of all ranks; called where gradients, which DDP keeps
            equal on all, are bad.
        optimizers: the torch optimizers, for their state of a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        on_error: Callable[[str, Exception], None],
        share: Callable[[NonFinite | None, int], NonFinite | None] | None,
        optimizers: Sequence[Any],
    ) -> None:
        self._model, self._on_error = model, on_error
        self.share, self._optimizers = share, optimizers

    def trace(self, step: int, calls: Sequence[ForwardCall], seen: Seen) -> NonFinite:
        """Return the origin of a bad step, and its cause.

        Args:
            step: its number.
            calls: its forwards.
            seen: the evidence so far.
        """
        found, replayed = None, bool(calls) and not is_split(self._model)
        if replayed:
            found = self._replay(find_in_forward, calls, step)
            if found is None and not seen.loss:
                found = self._replay(find_in_backward, calls, step)
        if found is None and seen.after_step:
            found = find_in_weights(self._model, step)
        if found is not None and found.kind == "parameter":
            found = self._attribute(found, seen.after_step)
        found = found or self._outside(step, replayed, seen)
        if self.share is not None and seen.gradient:
            try:
                found = self.share(found, step) or found
            except Exception as error:
                self._on_error("share", error)
        return found

    def _outside(self, step: int, replayed: bool, seen: Seen) -> NonFinite:
        """Return the finding where the model's own forward and backward are finite.

        Or could not be replayed.
        """
        cause: Cause = "objective" if replayed else ""
        found = find_in_gradients(self._model, step)
        if found is not None:
            grads = [each.grad for each in self._model.parameters() if each.grad is not None]
            halves = (each for each in grads if each.element_size() == 2)
            overflow = any(of_values(each) == "overflow" for each in halves)
            return replace(found, cause="overflow" if overflow else cause)
        if seen.loss and seen.no_gradient:
            return NonFinite(step, "loss", None, None, "loss", "every gradient is 0", "labels")
        if seen.loss:
            detail = "all was finite when the forwards were replayed"
            return NonFinite(step, "loss", None, None, "loss", detail, cause)
        if seen.at_any_scale:
            alone = ", though those of the model alone are when its forwards are replayed"
            detail = f"not finite at any scale{alone if replayed else ''}"
            return NonFinite(step, "gradient", None, None, "gradients", detail, cause)
        detail = "every gradient is finite, but not their norm"
        return NonFinite(step, "gradient", None, None, "gradient norm", detail, cause)

    def _attribute(self, found: NonFinite, after_step: bool) -> NonFinite:
        """Attribute a bad parameter to the optimizer's step on finite gradients, or not."""
        for name, parameter in self._model.named_parameters():
            layer, _, tensor = name.rpartition(".")
            owner = clean_name(layer) or type(self._model).__name__
            if (owner, tensor) == (found.layer, found.tensor):
                if not bool(local(parameter.detach()).isfinite().all()):
                    cause, why = of_weights(parameter, self._optimizers)
                    if why:
                        return replace(found, cause=cause, detail=f"{found.detail}; {why}")
                break
        if after_step:
            why = f"finite before step {found.step - 1}, as were the gradients that were checked"
            return replace(found, cause="optimizer", detail=f"{found.detail}; {why}")
        return found

    def _replay(
        self,
        find: Callable[[nn.Module, Sequence[ForwardCall], int], NonFinite | None],
        calls: Sequence[ForwardCall],
        step: int,
    ) -> NonFinite | None:
        try:
            return find(self._model, calls, step)
        except Exception as error:
            self._on_error("replay", error)
            return None
