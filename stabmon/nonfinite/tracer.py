"""Find out where a NaN or an inf began and what made it: replay the step, then ask the gradients
and the optimizer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from stabmon._torch.forward_call import ForwardCall, is_split
from stabmon._torch.tensors import local
from stabmon.capture import clean_name
from stabmon.nonfinite.causes import of_values, of_weights
from stabmon.nonfinite.first_bad_tensor import (
    find_in_backward,
    find_in_forward,
    find_in_gradients,
    find_in_weights,
)
from stabmon.records import Cause, NonFinite


@dataclass(frozen=True)
class Seen:
    """What was bad at a step."""

    loss: bool = False
    gradient: bool = False
    after_step: bool = False
    """Weights, right after the last step, whose gradients were finite."""
    no_gradient: bool = False
    """Every gradient that was looked at is exactly 0."""
    at_any_scale: bool = False
    """Gradients, at every scale that a gradient scaler has tried."""


class Tracer:
    """Makes a finding out of what was seen, to be called while parameters are those of the failing
    forward.

    Args:
        model: the model, as its forwards were recorded.
        on_error: told what failed in a replay: the place and the error.
        share: makes one finding out of those of all ranks; called where gradients, which DDP keeps
            equal on all, are bad.
        optimizers: the torch optimizers, for what they keep of a parameter.
    """

    def __init__(
        self,
        model: nn.Module,
        on_error: Callable[[str, Exception], None],
        share: Callable[[NonFinite | None, int], NonFinite | None] | None,
        optimizers: Sequence[Any],
    ) -> None:
        self._model, self._on_error, self.share, self._optimizers = (
            model,
            on_error,
            share,
            optimizers,
        )

    def trace(self, step: int, calls: Sequence[ForwardCall], seen: Seen) -> NonFinite:
        """Where it began, and what made it."""
        found, replayed = None, bool(calls) and not is_split(self._model)
        if replayed:
            found = self._replay(find_in_forward, calls, step)
            if found is None and not seen.loss:
                found = self._replay(find_in_backward, calls, step)
        if found is None and seen.after_step:
            found = find_in_weights(self._model, step)
        if found is not None and found.kind == "parameter":
            found = self._who_made(found, seen.after_step)
        found = found or self._outside(step, replayed, seen)
        if self.share is not None and seen.gradient:
            try:
                found = self.share(found, step) or found
            except Exception as error:
                self._on_error("share", error)
        return found

    def _outside(self, step: int, replayed: bool, seen: Seen) -> NonFinite:
        """What is bad though the model's own forward and backward are finite, or could not be made
        again.
        """
        cause: Cause = "objective" if replayed else ""
        found = find_in_gradients(self._model, step)
        if found is not None:
            halves = [
                p.grad
                for p in self._model.parameters()
                if p.grad is not None and of_values(p.grad) == "overflow"
            ]
            return replace(
                found,
                cause="overflow" if any(each.element_size() == 2 for each in halves) else cause,
            )
        if seen.loss and seen.no_gradient:
            return NonFinite(step, "loss", None, None, "loss", "every gradient is 0", "labels")
        if seen.loss:
            return NonFinite(
                step,
                "loss",
                None,
                None,
                "loss",
                "all was finite when the forwards were replayed",
                cause,
            )
        if seen.at_any_scale:
            detail = "not finite at any scale" + (
                ", though those of the model alone are when its forwards are replayed"
                if replayed
                else ""
            )
            return NonFinite(step, "gradient", None, None, "gradients", detail, cause)
        return NonFinite(
            step,
            "gradient",
            None,
            None,
            "gradient norm",
            "every gradient is finite, but not their norm",
            cause,
        )

    def _who_made(self, found: NonFinite, after_step: bool) -> NonFinite:
        """Whether a parameter became what it is in the optimizer's step on finite gradients."""
        for name, parameter in self._model.named_parameters():
            layer, _, tensor = name.rpartition(".")
            if (
                tensor == found.tensor
                and (clean_name(layer) or type(self._model).__name__) == found.layer
            ):
                if not bool(local(parameter.detach()).isfinite().all()):
                    cause, why = of_weights(parameter, self._optimizers)
                    if why:
                        return replace(found, cause=cause, detail=f"{found.detail}; {why}")
                break
        if after_step:
            why = f"finite before step {found.step - 1}, as were the gradients that were looked at"
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
