"""Detection of values that are not finite, at every step."""

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
from stabmon.nonfinite.bad_values import all_finite, largest_of, largest_values
from stabmon.nonfinite.gradient_probe import GradientProbe
from stabmon.nonfinite.skipped_steps import SkippedSteps
from stabmon.nonfinite.tracer import Seen, Tracer
from stabmon.records import Cause, NonFinite

_PATIENCE = 10
"""Finite steps in a row that end an episode; the next is traced anew."""
_LOSS, _GRADIENTS = 1, 2
"""Extents of an episode; one that goes further is traced anew."""
Extent = Literal["nothing", "gradients", "weights"]
_EXTENTS = ("", "nothing", "gradients", "weights")
"""Extents of an episode in the record, in this order."""


class NonFiniteDetector(StepListener):
    """Check of a step's losses and of a few of its gradients and weights.

    A non-finite episode lasts until enough steps in a row were finite. The step's forwards are
    replayed when it begins, and once more where it goes further than the loss. One device
    synchronisation a step.

    Args:
        model: the model, as its forwards were recorded.
        on_error: called with the place and the error where a replay fails.
        share: makes one finding out of those of all ranks; called where gradients, which DDP keeps
            equal on all, are bad.
        optimizer: reports steps that were skipped, and the state of a parameter; None where it is
            not known.
    """

    def __init__(
        self,
        model: nn.Module,
        on_error: Callable[[str, Exception], None],
        share: Callable[[NonFinite | None, int], NonFinite | None] | None = None,
        optimizer: OptimizerAdapter | None = None,
    ) -> None:
        self._model = model
        self._optimizer = optimizer or OptimizerAdapter(None)
        self._tracer = Tracer(model, on_error, share, self._optimizer.scalers.optimizers)
        self._skipped = SkippedSteps(self._optimizer)
        self._probe: GradientProbe | None = None
        self._found: NonFinite | None = None
        self._last_bad, self._reached = -math.inf, 0
        self._after: list[Tensor] = []
        """Largest value of a few weights after the last step, not yet brought to the host."""
        self._seen: Seen | None = None
        """Evidence of the present step before the optimizer made it; None if not checked."""
        self._was_fine = self._began = False

    def report_alone(self) -> None:
        """Report the findings of this rank alone."""
        self._tracer.share = None

    def found_since(self, step: int | float) -> NonFinite | None:
        """Return the origin of the present episode, if it showed after ``step``."""
        return self._found if self._last_bad > step else None

    def before_optimizer_step(self, ctx: StepContext) -> None:
        # several optimizers may have gradients made anew between their steps
        """Check losses, gradients and weights, once for each set of gradients."""
        if ctx.is_first or ctx.has_new_gradients:
            self.has_news |= self._inspect(ctx)

    def on_step_end(self, ctx: StepContext) -> None:
        # a loss on another device is read when a reading needs it
        """Note the end of a step, and the extent of its episode."""
        loss = ctx.loss if isinstance(ctx.loss, float) else None
        self.has_news |= self._end_step(ctx.step, loss, ctx.forwards, ctx.was_skipped)

    def _inspect(self, ctx: StepContext) -> bool:
        """Inspect losses, gradients and weights before the optimizer steps.

        Returns:
            Whether a non-finite episode began here, or went further.
        """
        # a gradient scaler meets bad gradients daily, and skips the step by itself
        gradients, losses, norm = not self._optimizer.skips_bad_steps, ctx.losses, ctx.gradient_norm
        self._probe = self._probe or GradientProbe(self._model)
        shown = self._probe.gradients() if gradients else []
        after, self._after = self._after, []
        largest = largest_of([*losses, *shown], after)
        of_losses, largest = largest[: len(losses)], largest[len(losses) :]
        of_gradients, of_weights = largest[: len(shown)], largest[len(shown) :]
        bad_norm = gradients and norm is not None and not math.isfinite(norm)
        bad_gradient = bad_norm or not all_finite(of_gradients)
        bad_weights = not all_finite(of_weights)
        self._seen = Seen(
            loss=not all_finite(of_losses),
            gradient=bad_gradient,
            after_step=bad_weights and self._was_fine,
            no_gradient=bool(of_gradients) and not any(of_gradients),
        )
        self._was_fine = not bad_gradient and not bad_weights
        if not self._seen.loss and self._was_fine:
            return False
        reached = _LOSS if self._was_fine else _GRADIENTS
        news = self._note_bad_step(ctx.step, reached, ctx.forwards, self._seen)
        return (bad_weights and self._extend("weights")) or news

    def _end_step(
        self, step: int, loss: float | None, calls: Sequence[ForwardCall], skipped: bool | Tensor
    ) -> bool:
        """Note a step that is over, and how far an episode has come.

        Args:
            step: its number.
            loss: its loss, where that is known already.
            calls: its forwards.
            skipped: whether the optimizer did not make it, see
                :meth:`~stabmon._torch.optimizer_adapter.OptimizerAdapter.left_out`.

        Returns:
            Whether an episode began here, or went further.
        """
        seen, self._seen, news = self._seen, None, False
        bad_loss = loss is not None and not math.isfinite(loss)
        if isinstance(skipped, Tensor) and (bad_loss or self._last_bad == step):
            skipped = bool(skipped > 0)
        if bad_loss and self._last_bad != step:
            # what was left out has moved no weights, so that it can be replayed still
            again = calls if skipped is True else None
            bad = replace(seen or Seen(), loss=True)
            news = self._note_bad_step(step, _LOSS, again, bad, f"loss is {loss}")
        in_weights = self._found is not None and self._found.touched == "weights"
        if seen is not None and seen.gradient and not in_weights:
            skipped = True  # a step that is made is made with other gradients than these
        nothing = seen is not None and seen.no_gradient and self._last_bad == step
        if self._skipped.note(nothing or skipped, bad=self._last_bad == step):
            self._note_stuck(step, calls)
            news = True
        elif self._skipped.stuck:
            self._last_bad = step
        if self._began:
            self._extend(self._extent(skipped, seen))
        self._began = False
        self._after = self._largest_weights()
        return news

    def _extent(self, skipped: bool | Tensor, seen: Seen | None) -> Extent:
        """Return the extent of the bad values of a step that is over."""
        if self._has_corrupted():
            return "weights"
        unseen = seen is None and not all_finite(largest_of(GradientProbe(self._model).gradients()))
        return "gradients" if skipped is not False or unseen else "nothing"

    def note_loss(self, step: int, loss: float) -> None:
        """Note a loss that is not finite, of a step that is over for some time.

        Findings about the step so far win.

        Args:
            step: its number.
            loss: its loss, NaN or inf.
        """
        if self._last_bad < step:
            self._note_bad_step(step, _LOSS, None, Seen(loss=True), f"loss is {loss}")
            self._extend("weights" if self._has_corrupted() else "nothing")
            self._began = False

    def rolled_back(self, step: int) -> None:
        """End the present episode: the weights are those after ``step`` again."""
        self._last_bad, self._reached, self._after = -math.inf, 0, []

    def state_dict(self) -> dict[str, Any]:
        """Return the present episode as plain values."""
        if self._found is None or not math.isfinite(self._last_bad):
            return {}  # a rollback has ended the episode
        return {
            "found": self._found.to_dict(),
            "last_bad": self._last_bad,
            "reached": self._reached,
        }

    def parse_state(self, state: Mapping[str, Any] | Stored) -> Callable[[], None]:
        """Read a whole state, and return the function that takes it up.

        Args:
            state: a value of :meth:`state_dict`.

        Raises:
            ValueError: if it is no state of a detector.
        """
        saved = Stored.of(state)
        found, last_bad, reached = None, -math.inf, 0
        # earlier versions stored an episode that a rollback had ended, as -inf
        if saved.mapping() and saved["last_bad"].number() != -math.inf:
            found = NonFinite.from_dict(saved["found"])
            last_bad = saved["last_bad"].integer()
            reached = saved.get("reached", _GRADIENTS).integer()

        def take_up() -> None:
            self._found, self._last_bad, self._reached = found, last_bad, reached

        return take_up

    def _note_bad_step(
        self,
        step: int,
        reached: int,
        calls: Sequence[ForwardCall] | None,
        seen: Seen,
        detail: str = "",
    ) -> bool:
        """Note a bad step, and return whether an episode begins or goes further.

        Traced by ``calls``; None where weights have moved since.
        """
        over = step - self._last_bad > _PATIENCE
        begins = over or reached > self._reached
        self._last_bad, self._reached = step, reached if over else max(reached, self._reached)
        if begins and calls is not None:
            self._found, self._began = self._tracer.trace(step, calls, seen), True
        elif begins:  # its gradients were finite, or nobody could look
            cause: Cause = "labels" if seen.no_gradient else "objective"
            detail += ", and every gradient is 0" if seen.no_gradient else ""
            self._found = NonFinite(step, "loss", None, None, "loss", detail, cause)
            self._began = True
        return begins

    def _extend(self, extent: Extent) -> bool:
        """Note the extent of an episode, and return whether that is further than before."""
        if self._found is None or _EXTENTS.index(self._found.touched) >= _EXTENTS.index(extent):
            return False
        self._found = replace(self._found, touched=extent)
        return True

    def _note_stuck(self, step: int, calls: Sequence[ForwardCall]) -> None:
        """Note that nothing is trained: more steps were skipped than a search takes."""
        known = self._found if step - self._last_bad <= _PATIENCE else None
        if known is None or (known.touched == "nothing" and known.cause != "labels"):
            known = self._tracer.trace(step, calls, Seen(gradient=True, at_any_scale=True))
            known = replace(known, touched="gradients")
            self._began, self._reached = True, _GRADIENTS
        self._last_bad = step
        self._found = replace(
            known,
            skipped=self._skipped.in_a_row,
            search=self._skipped.search,
            scale=self._optimizer.scale(),
        )

    def _has_corrupted(self) -> bool:
        """Return True if any parameter or running statistic is not finite.

        -inf in a buffer may hide keys, and does not count.
        """
        weights = [local(each.detach()) for each in self._model.parameters() if _may_be_bad(each)]
        statistics = [local(each) for each in self._model.buffers() if _may_be_bad(each)]
        largest = largest_of([*weights, *statistics])
        return not all_finite(largest[: len(weights)]) or any(
            map(math.isnan, largest[len(weights) :])
        )

    @torch.no_grad()
    def _largest_weights(self) -> list[Tensor]:
        """Return the largest value of a few weights, without waiting for a device."""
        if self._probe is None:
            return []
        weights = [weight for weight in self._probe.weights() if weight.numel()]
        return largest_values(weights)


def _may_be_bad(tensor: Tensor) -> bool:
    """Return True if a tensor's format holds inf; those of quantised weights do not."""
    return tensor.is_floating_point() and tensor.element_size() > 1
