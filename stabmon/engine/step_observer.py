"""Observe a training step: its forwards, attention, losses and gradients."""

from __future__ import annotations

import functools
import logging
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.callbacks.weak_method import weakly
from stabmon._torch.device_timer import DeviceTimer
from stabmon._torch.forward_call import ForwardCall, StepForwards
from stabmon._torch.ranks.identity import runs_context_parallel
from stabmon._torch.ranks.pipeline_schedule import divisor_of_gradients
from stabmon._torch.recomputation import is_checkpointed
from stabmon.capture import AttentionCapture, compiled_modules
from stabmon.capture.coverage.witness import listed
from stabmon.config import StabilityConfig
from stabmon.engine.clock import StepClock
from stabmon.engine.error_boundary import contained
from stabmon.engine.forward_hooks import ForwardHooks
from stabmon.engine.gradients import AfterBackward, GradientNorms
from stabmon.engine.loss_accumulator import LossAccumulator
from stabmon.records import AttentionCall
from stabmon.signals.accumulator import Measurements

logger = logging.getLogger("stabmon")

_COMPILE_LOOKUPS = 3
"""Steps without a forward in which a compiled wrapper is looked for; after them no longer."""


class StepObserver:
    """The attention, losses and gradients of the step in progress. It judges nothing.

    It is the source of the clock's ``on_attention``, ``on_forward_end`` and ``on_backward_end``.
    Hooks are on the model from :meth:`start` of a step that is watched to that of one that is not,
    or to :meth:`close`. The capture is open in training forwards of sampled steps, and of others
    where a listener wants attention.

    Args:
        model: the model that trains.
        config: what to measure, and whether to keep forwards for a replay.
        clock: fires what happens in forwards and backwards.
        scale: returns the factor by which a gradient scaler multiplies gradients; None without one.
    """

    def __init__(
        self,
        model: nn.Module,
        config: StabilityConfig,
        clock: StepClock,
        scale: Callable[[], float | None],
    ) -> None:
        boundary = self.boundary = clock.boundary
        self.forwards = StepForwards()
        self.last_forward: list[ForwardCall] = []
        """First forward of the newest completed step, until the next begins, or empty.

        It is empty where the forward cannot be replayed.
        """
        self.losses = LossAccumulator(keep=20 * config.history)
        self.measurements = Measurements(
            config.signals,
            config.engine,
            config.sample_rows,
            functools.partial(boundary.failed, "signal"),
        )
        self.interrupted = False
        """True if a forward of this step raised."""
        self.on_first_forward: Callable[[], None] | None = None
        """Called once, before the first training forward."""
        self._timer = DeviceTimer()
        self._model = model
        self._keeps_inputs = config.watch_every_step
        self._clock, self._scale = clock, scale
        self._sampled = self._forwards_attention = self._capturing = False
        self._frozen: set[str] = set()
        """Layers left out, since they run frozen and without gradients."""
        self._in_context_parallel = False
        """The newest forward had its keys on several ranks."""
        self._current: nn.Module | None = None
        self._call: ForwardCall | None = None
        self._capture = AttentionCapture(
            model,
            weakly(self._on_call),
            modules=config.attention_modules,
            on_error=functools.partial(boundary.failed, "capture"),
        )
        self._norms = GradientNorms()
        self._divisor = 1.0
        """Number by which a pipeline's schedule divides gradients after the newest forward."""
        self._gradients: dict[str, float] = {}
        self._after_backward = AfterBackward(weakly(self._backward_ended))
        self._hooks: ForwardHooks | None = None
        self._outer: list[nn.Module] | None = None
        """Compiled wrappers around the model; None before they were looked for."""
        self._lookups_left = _COMPILE_LOOKUPS

    def start(self, step: int, *, sampled: bool, watched: bool) -> None:
        """Drop the last step and prepare for ``step``.

        Args:
            step: the optimizer step that begins, counted from 1.
            sampled: measure its attention and gradients.
            watched: keep hooks on the model in this step.
        """
        self.reset()
        self.measurements.start(step)
        self._sampled = sampled
        if not watched:
            self._remove_hooks()
        elif self._hooks is not None:
            self._hooks.reset()
        else:
            if self._outer is None:
                self._outer = compiled_around(self._model)
            self._hooks = ForwardHooks(
                self._model,
                self._outer,
                self._forward_begins,
                self._forward_ends,
                functools.partial(self.boundary.failed, "forward"),
            )
        if sampled or self._clock.wants_backward_end:
            self._after_backward.watch(self._model)

    def reset(self) -> None:
        """Drop everything of the step but the losses that no reading has had."""
        self.stop_capture()
        self._after_backward.close()
        self.measurements.start(0)
        self.last_forward = self.forwards.calls[:1] or self.last_forward
        self.forwards, self._norms, self._gradients = StepForwards(), GradientNorms(), {}
        self.losses.start_step()
        self.interrupted, self._current, self._call = False, None, None

    def close(self) -> None:
        """Take everything out of the model."""
        self._remove_hooks()
        self.reset()
        self.last_forward = []

    @contained
    def stop_capture(self) -> None:
        """Close the capture, where a forward never came to its end."""
        if self._capturing:
            self._capture.__exit__()
            self._capturing = False  # else it is tried again, at the next step at the latest

    def settle(self) -> None:
        """Count what measuring took on a device, before the first wait for it in a sampled step."""
        self.boundary.settle(self._timer)

    @property
    def gradients(self) -> dict[str, float]:
        """L2 norms before clipping, by layer, of all as ``""``; empty if unknown."""
        if not self._gradients:
            self._gradients = self._norms.by_layer(self._model, self.measurements.modules)
        return self._gradients

    @property
    def gradient_squares(self) -> dict[str, float]:
        """Squared norms of this rank's parts of sharded gradients, by layer; empty for others."""
        norms = self._norms
        return norms.squares(self._model, self.measurements.modules) if norms.is_partial else {}

    @property
    def why_no_gradients(self) -> str:
        """Reason for which this step's gradient norms are unknown."""
        if self._norms.is_partial and not self._norms.why_unknown:
            return (
                "they are sharded, and this rank reports alone: give every rank a monitor with "
                "reduce_ranks=True"
            )
        return self._norms.why_unknown or "no backward of the model was seen before the step"

    @property
    def has_backward(self) -> bool:
        """Return whether a backward of this step was seen, whatever it left."""
        return self._norms.is_partial or bool(self._norms.why_unknown)

    def drop_gradients(self) -> None:
        """Leave this step's gradient norms unknown."""
        self._norms, self._gradients = GradientNorms(), {}

    @contained
    def _backward_ended(self, added: dict[int, Tensor]) -> None:
        if self._clock.is_recording:
            self._measure_gradients(added)
            self._clock.on_backward_end()

    @contained
    def _measure_gradients(self, added: dict[int, Tensor]) -> None:
        if self._sampled:
            self._gradients = {}
            self._norms.measure(self._model, added, self._scale(), self._divisor)

    def find_compiled_wrapper(self) -> bool:
        """Add hooks to a wrapper that was compiled around the model later.

        For a step without a forward: the training loop then calls the wrapper.

        Returns:
            Whether one was found, so that the next step's forward will be seen.
        """
        if self._hooks is None or self._lookups_left == 0:
            return False
        self._lookups_left -= 1
        outer = compiled_around(self._model)
        if outer and outer != self._outer:
            self._outer = outer
            self._hooks.add_roots(outer)
            return True
        return False

    def explain_missing_attention(self) -> str | None:
        """Return why a sampled step had no attention call; None if reported before."""
        if self.interrupted or self.boundary.errors["capture"]:
            return None
        if self._in_context_parallel:
            return (
                "context parallel is not supported, since each rank sees a part of the keys of its "
                "queries: attention is not read"
            )
        if not self.forwards.count:
            return (
                "no training forward of the model was seen (a forward with gradients, in train "
                "mode, called on the model given to "
                "stabmon and not inside a compiled function)"
            )
        if self._capture.unseen:
            return (
                "attention ran inside a compiled function, where nothing is seen: compile the "
                "model, not the function around it"
            )
        unseen = f", and {listed(self.unseen)} is none of these" if self.unseen else ""
        looked_for = (
            f"no attention was found in {type(self._model).__name__}; looked for "
            f"{self._capture.looked_for()}{unseen}"
        )
        return f"{looked_for}; name hand-written attention in attention_modules=[...]"

    @property
    def unseen(self) -> Mapping[str, str]:
        """Modules with attention that is not seen, by name, in words."""
        return self._capture.witness.unseen

    def describe_unseen(self) -> str | None:
        """Describe what is seen and what is not; None if all is seen, or nothing."""
        return self._capture.witness.describe() if self._capture.witness.seen else None

    @contained
    def _forward_begins(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> None:
        self.stop_capture()
        training = self._model.training or any(each.training for each in module.modules())
        if not training or not torch.is_grad_enabled() or not self._clock.is_recording:
            return
        first, self.on_first_forward = self.on_first_forward, None
        if first is not None:
            first()
        # torch._C._current_graph_task_id() is the number of the backward that runs in this thread,
        # -1 outside of one (checked with torch 2.13). Without it a backward that raised could not
        # be told from one that is still under way, as where a hook makes a forward.
        if torch._C._current_graph_task_id() == -1:
            self._after_backward.reset()  # an earlier backward may have raised
        self.last_forward = []
        self._call = self.forwards.add(module, args, kwargs, keep=self._keeps_inputs)
        self._current = module
        self._divisor = divisor_of_gradients() if self._sampled else 1.0
        self._forwards_attention = self._clock.wants_attention
        if self._sampled or self._forwards_attention:
            self._in_context_parallel = runs_context_parallel()
            if self._in_context_parallel:
                return
            self._capture.__enter__()
            self._capturing = True

    @contained
    def _forward_ends(self, module: nn.Module, output: Any) -> None:
        if self._capturing:
            self._capture.witness.end(output)
        self.stop_capture()
        if self._current is module:
            self._current = None
            self.losses.add_from_output(output)
            self._clock.on_forward_end(self._call, output)
        if output is None and sys.exc_info()[0] is not None and self._clock.is_recording:
            # the forward raised, and close() may never be called; the next step adds hooks again
            self.close()
            self._clock.on_forward_error()
            self.interrupted = True

    def _on_call(self, call: AttentionCall) -> None:
        with self.boundary.timed():
            if is_frozen(call):
                self._note_frozen(call.layer)
                return
            if self._sampled:
                with self._timer.around(call.query if call.scores is None else call.scores):
                    self.measurements.add(call)
            if self._forwards_attention:
                self._clock.on_attention(call)

    def _note_frozen(self, layer: str) -> None:
        if layer not in self._frozen:
            if not self._frozen:
                logger.info(
                    "%s and what else runs frozen and without gradients (a teacher) is no layer in "
                    "training, and is left out",
                    layer,
                )
            self._frozen.add(layer)

    def _remove_hooks(self) -> None:
        if self._hooks is not None:
            self._hooks.close()
            self._hooks = None


def is_frozen(call: AttentionCall) -> bool:
    """Return whether a layer has no weight to train and no gradient to pass on.

    So has a teacher inside a model. A layer with trainable parts runs without gradients too inside
    a reentrant activation checkpoint, and one without any may stand behind a trainable prompt there.
    """
    tensors = (call.query, call.key, call.scores)
    if call.module is None or any(each is not None and each.requires_grad for each in tensors):
        return False
    parameters = list(call.module.parameters())
    trains = any(each.requires_grad for each in parameters)
    return bool(parameters) and not trains and not is_checkpointed()


def compiled_around(model: nn.Module) -> list[nn.Module]:
    """Return a list of the compiled wrapper that callers call, or an empty one.

    It is a module that holds ``model``, or the model itself where it was compiled in place.
    """
    return [
        m
        for m in compiled_modules(model)
        if m is model or any(inner is model for inner in m.modules())
    ][:1]
