"""Notice at every step whether its loss, gradients and weights are finite, and find out once where
a misfortune began.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from stabmon._storage.stored_value import Stored
from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.optimizer_adapter import OptimizerAdapter
from stabmon._torch.tensors import local
from stabmon.listeners import StepContext, StepListener
from stabmon.nonfinite.gradient_probe import GradientProbe
from stabmon.nonfinite.skipped_steps import SkippedSteps
from stabmon.nonfinite.tracer import Seen, Tracer
from stabmon.records import NonFinite

_PATIENCE = 10
"""Finite steps in a row after which a misfortune is over; the next one is traced anew."""
_LOSS, _GRADIENTS = 1, 2
"""What a misfortune has reached; one that goes further is traced anew."""
_TOUCHED = ("", "nothing", "gradients", "weights")
"""How far a misfortune has come, in this order."""


class NonFiniteDetector(StepListener):
    """Looks at a step's losses and a few of its gradients and weights, and replays the step's
    forwards when a misfortune begins.

    A misfortune lasts until enough steps in a row were finite, and is traced once, and once more
    where it goes further than the loss. One device synchronisation a step.

    Args:
        model: the model, as its forwards were recorded.
        on_error: told what failed in a replay: the place and the error.
        share: makes one finding out of those of all ranks; called where gradients, which DDP keeps
            equal on all, are bad.
        optimizer: tells of steps that were left out, and what it keeps of a parameter; None where
            it is not known.
    """

    def __init__(
        self,
        model: nn.Module,
        on_error: Callable[[str, Exception], None],
        share: Callable[[NonFinite | None, int], NonFinite | None] | None = None,
        optimizer: OptimizerAdapter | None = None,
    ) -> None:
        self._model = model
        self._view = optimizer or OptimizerAdapter(None)
        self._tracer = Tracer(model, on_error, share, self._view.scalers.optimizers)
        self._skipped = SkippedSteps(self._view)
        self._sentinels: GradientProbe | None = None
        self._found: NonFinite | None = None
        self._last_bad, self._reached = -math.inf, 0
        self._after: list[Tensor] = []
        """The largest value of a few weights after the last step, not yet brought to the host."""
        self._seen: Seen | None = None
        """What the present step showed before the optimizer made it; None where nobody looked."""
        self._was_fine = self._began = False

    def report_alone(self) -> None:
        """Report the findings of this rank alone."""
        self._tracer.share = None

    def found_since(self, step: int | float) -> NonFinite | None:
        """Where the present misfortune began, if it showed after ``step``."""
        return self._found if self._last_bad > step else None

    def before_optimizer_step(self, ctx: StepContext) -> None:
        # with several optimizers, gradients may be made anew between their steps
        if ctx.is_first or ctx.has_new_gradients:
            self.has_news |= self._inspect(ctx)

    def on_step_end(self, ctx: StepContext) -> None:
        # a loss on another device is read when a reading needs it
        loss = ctx.loss if isinstance(ctx.loss, float) else None
        self.has_news |= self._end_step(ctx.step, loss, ctx.forwards, ctx.was_skipped)

    def _inspect(self, ctx: StepContext) -> bool:
        """Inspect losses, gradients and weights before the optimizer steps.

        Returns:
            Whether a non-finite episode began here, or went further.
        """
        # a gradient scaler meets bad gradients daily, and skips the step by itself
        gradients, losses, norm = not self._view.skips_bad_steps, ctx.losses, ctx.gradient_norm
        self._sentinels = self._sentinels or GradientProbe(self._model)
        shown = self._sentinels.gradients() if gradients else []
        after, self._after = self._after, []
        largest = largest_of([*losses, *shown], after)
        of_losses, largest = largest[: len(losses)], largest[len(losses) :]
        of_gradients, of_weights = largest[: len(shown)], largest[len(shown) :]
        bad_gradient = not _finite(of_gradients) or (
            gradients and norm is not None and not math.isfinite(norm)
        )
        bad_weights = not _finite(of_weights)
        blamed, self._was_fine = (
            bad_weights and self._was_fine,
            not bad_gradient and not bad_weights,
        )
        self._seen = Seen(
            not _finite(of_losses),
            bad_gradient,
            blamed,
            bool(of_gradients) and not any(of_gradients),
        )
        if not self._seen.loss and self._was_fine:
            return False
        reached = _LOSS if self._was_fine else _GRADIENTS
        news = self._take(ctx.step, reached, ctx.forwards, self._seen)
        return (bad_weights and self._touch("weights")) or news

    def _end_step(
        self, step: int, loss: float | None, calls: Sequence[ForwardCall], left_out: bool | Tensor
    ) -> bool:
        """Take note of a step that is over, and how far a misfortune has come.

        Args:
            step: its number.
            loss: its loss, where that is known already.
            calls: its forwards.
            left_out: whether the optimizer did not make it, see
                :meth:`~stabmon._torch.optimizer_adapter.OptimizerAdapter.left_out`.

        Returns:
            Whether a misfortune began here, or went further.
        """
        seen, self._seen, news = self._seen, None, False
        bad_loss = loss is not None and not math.isfinite(loss)
        if isinstance(left_out, Tensor) and (bad_loss or self._last_bad == step):
            left_out = bool(left_out > 0)
        if bad_loss and self._last_bad != step:
            # what was left out has moved no weights, so that it can be replayed still
            again = calls if left_out is True else None
            news = self._take(
                step, _LOSS, again, replace(seen or Seen(), loss=True), f"loss is {loss}"
            )
        if (
            seen is not None
            and seen.gradient
            and (self._found is None or self._found.touched != "weights")
        ):
            left_out = True  # whoever steps, it is with other gradients than these
        nothing = seen is not None and seen.no_gradient and self._last_bad == step
        if self._skipped.note(nothing or left_out, bad=self._last_bad == step):
            self._stuck(step, calls)
            news = True
        elif self._skipped.stuck:
            self._last_bad = step
        if self._began:
            spoilt, untold = (
                self._spoilt(),
                seen is None and not _finite(largest_of(GradientProbe(self._model).gradients())),
            )
            self._touch(
                "weights"
                if spoilt
                else "gradients"
                if left_out is not False or untold
                else "nothing"
            )
        self._began = False
        self._after = self._largest_weights()
        return news

    def note_loss(self, step: int, loss: float) -> None:
        """Take note of a loss that is not finite, of a step that is over for some time; what was
        told of it already wins.
        """
        if self._last_bad < step:
            self._take(step, _LOSS, None, Seen(loss=True), f"loss is {loss}")
            self._touch("weights" if self._spoilt() else "nothing")
            self._began = False

    def state_dict(self) -> dict[str, Any]:
        """The present misfortune, as plain values."""
        if self._found is None:
            return {}
        return {
            "found": self._found.to_dict(),
            "last_bad": self._last_bad,
            "reached": self._reached,
        }

    def parse_state(self, state: Mapping[str, Any] | Stored) -> Callable[[], None]:
        """Read a state whole, and return what takes it up.

        Raises:
            ValueError: if it is no state of a watch.
        """
        saved = Stored.of(state)
        found = NonFinite.from_dict(saved["found"]) if saved.mapping() else None
        last_bad = saved["last_bad"].integer() if saved.mapping() else -math.inf
        reached = saved.get("reached", _GRADIENTS).integer() if saved.mapping() else 0

        def take_up() -> None:
            self._found, self._last_bad, self._reached = found, last_bad, reached

        return take_up

    def _take(
        self,
        step: int,
        reached: int,
        calls: Sequence[ForwardCall] | None,
        seen: Seen,
        detail: str = "",
    ) -> bool:
        """Take note of a bad step; whether a misfortune begins. Traced by ``calls``; None where
        weights have moved since.
        """
        over = step - self._last_bad > _PATIENCE
        begins = over or reached > self._reached
        self._last_bad, self._reached = step, reached if over else max(reached, self._reached)
        if begins and calls is not None:
            self._found, self._began = self._tracer.trace(step, calls, seen), True
        elif begins:  # its gradients were finite, or nobody could look
            told = f"{detail}, and every gradient is 0" if seen.no_gradient else detail
            self._found = NonFinite(
                step,
                "loss",
                None,
                None,
                "loss",
                told,
                "labels" if seen.no_gradient else "objective",
            )
            self._began = True
        return begins

    def _touch(self, what: Literal["nothing", "gradients", "weights"]) -> bool:
        """Note how far it has come; whether that is further than before."""
        if self._found is None or _TOUCHED.index(self._found.touched) >= _TOUCHED.index(what):
            return False
        self._found = replace(self._found, touched=what)
        return True

    def _stuck(self, step: int, calls: Sequence[ForwardCall]) -> None:
        """More steps in a row were left out than a search takes: nothing is trained."""
        known = self._found if step - self._last_bad <= _PATIENCE else None
        if known is None or (known.touched == "nothing" and known.cause != "labels"):
            known, self._began = (
                self._tracer.trace(step, calls, Seen(gradient=True, at_any_scale=True)),
                True,
            )
            known, self._reached = replace(known, touched="gradients"), _GRADIENTS
        self._last_bad, skipped = step, self._skipped
        self._found = replace(
            known, skipped=skipped.in_a_row, search=skipped.search, scale=self._view.scale()
        )

    def _spoilt(self) -> bool:
        """Whether any parameter, or running statistic, holds what is not finite; -inf in a buffer
        may hide keys.
        """
        weights = [local(each.detach()) for each in self._model.parameters() if _may_be_bad(each)]
        statistics = [local(each) for each in self._model.buffers() if _may_be_bad(each)]
        largest = largest_of([*weights, *statistics])
        return not _finite(largest[: len(weights)]) or any(map(math.isnan, largest[len(weights) :]))

    @torch.no_grad()
    def _largest_weights(self) -> list[Tensor]:
        """Of a few weights; waits for no device."""
        if self._sentinels is None:
            return []
        weights = [weight for weight in self._sentinels.weights() if weight.numel()]
        return list(torch._foreach_norm(weights, math.inf)) if weights else []


@torch.no_grad()
def largest_of(tensors: Sequence[Tensor], largest: Sequence[Tensor] = ()) -> list[float]:
    """The largest absolute value of each tensor, NaN where one is; then the numbers ``largest``.
    One transfer to the host.
    """
    if any(
        not tensor.numel() for tensor in tensors
    ):  # shards can be empty, and have no largest value
        tensors = [tensor if tensor.numel() else tensor.new_zeros(1) for tensor in tensors]
    found = [*(torch._foreach_norm(list(tensors), math.inf) if tensors else ()), *largest]
    if not found:
        return []
    device = found[0].device
    values: list[float] = torch.stack([each.to(device) for each in found]).tolist()
    return values


def _finite(values: Sequence[float]) -> bool:
    return all(map(math.isfinite, values))


def _may_be_bad(tensor: Tensor) -> bool:
    """Whether a tensor is of a format that holds inf; quantised weights are of none."""
    return tensor.is_floating_point() and tensor.element_size() > 1
