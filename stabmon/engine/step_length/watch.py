"""Measure at each step whether it was too long, and conclude which rate fits."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.callbacks.inert_hook import InertHook
from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.host_copy import HostCopy
from stabmon._torch.optimizer_adapter import OptimizerAdapter, ParameterGroup, takes_hooks
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.engine.step_length.probe import StepProbe
from stabmon.engine.step_length.rate_watch import RateWatch
from stabmon.listeners import StepContext, StepListener
from stabmon.records import Overshoot


class StepLength(StepListener):
    """The listener that finds steps that are too long.

    :class:`RateWatch` decides which steps to probe, and :class:`StepProbe` measures them. It
    changes nothing: parameters are bit for bit where the optimizer left them, gradients and random
    generators untouched.

    Args:
        optimizers: the run's optimizers.
        scheduled: returns the rate of a group as its scheduler has set it.
        factors: returns the share of its scheduled rate that each group used in the newest step,
            where it is not 1.
        boundary: counts what fails in the optimizers' hooks.
        model: the model that trains.
    """

    def __init__(
        self,
        optimizers: OptimizerAdapter,
        scheduled: Callable[[ParameterGroup], float | None],
        factors: Callable[[], Mapping[str, float]],
        boundary: ErrorBoundary,
        model: nn.Module,
    ) -> None:
        self.boundary = boundary
        self.rates = RateWatch()
        self._optimizers, self._scheduled, self._factors = optimizers, scheduled, factors
        self._probe = StepProbe(model)
        self._hooks: list[Any] = []
        self._used: dict[str, float] = {}
        self._last_loss: HostCopy | None = None

    @property
    def wants_backward_end(self) -> bool:
        return self._probe.active

    def on_step_begin(self, ctx: StepContext) -> None:
        self._probe.end()
        if not self._hooks:
            self._watch()
        now = {
            group.key: rate
            for group in self._optimizers.groups()
            if (rate := self._scheduled(group)) is not None
        }
        factors = self._factors()
        now = {key: rate * factors.get(key, 1.0) for key, rate in now.items()}
        self._used = {key: max(rate, self._used.get(key, 0.0)) for key, rate in now.items()}
        self._probe.begin(bool(self._hooks) and self.rates.wants(ctx.step, self._used))
        self._used = {}

    def on_forward_end(self, call: ForwardCall | None, output: Any) -> None:
        self._probe.add_forward(call, output)

    def on_forward_error(self) -> None:
        self._probe.end()

    def on_backward_end(self) -> None:
        self._probe.note_backward()

    def on_step_end(self, ctx: StepContext) -> None:
        self.has_news = self._judge(ctx.step, ctx.loss) is not None

    def _judge(self, step: int, loss: float | Tensor | None) -> Overshoot | None:
        """Return the evidence that this step or the last was too long, if any."""
        factors = self._factors()
        self._used = {key: rate * factors.get(key, 1.0) for key, rate in self._used.items()}
        quality = self._probe.quality(step) if self._probe.active else None
        if (
            self._probe.active
            and (how := self.rates.judge(quality, self._used)) is not None
            and quality is not None
        ):
            found = self._probe.find_factors()
            if any(factor < 1 for factor in found.values()):
                news = self.rates.conclude(
                    step, how, self._used, found, gain_ratio=quality.gain_ratio, rise=quality.rise
                )
                return None if how == "brisk" else news
        leapt = self._leap(step, loss)
        return (
            None
            if leapt is None or not self._used
            else self.rates.conclude_leap(step, leapt, self._used)
        )

    def shorten(self, factors: Mapping[str, float]) -> Callable[[], None] | None:
        """Shorten the step that was just made.

        Args:
            factors: the share of the step to keep, by group.

        Returns:
            A function that undoes it; None where the step was not probed.
        """
        return self._probe.shorten(factors) if self._probe.active else None

    def rolled_back(self, step: int) -> None:
        """Forget what steps have shown so far, after a return to the state after ``step``."""
        self.rates.reset()

    def close(self) -> None:
        self._probe.end()
        while self._hooks:
            self._hooks.pop().remove()

    def _watch(self) -> None:
        for optimizer in {
            id(group.optimizer): group.optimizer for group in self._optimizers.groups()
        }.values():
            if takes_hooks(optimizer):
                failed = functools.partial(self.boundary.failed, "step_length")
                before = InertHook(lambda stepping, *_: self._before_step(stepping), failed)
                after = InertHook(lambda stepping, *_: self._after_step(stepping), failed)
                self._hooks += [
                    optimizer.register_step_pre_hook(before),
                    optimizer.register_step_post_hook(after),
                ]

    @contained
    def _before_step(self, optimizer: torch.optim.Optimizer) -> None:
        if self._probe.active and not is_capturing():
            self._probe.before(
                {
                    each.key: each.parameters
                    for each in self._optimizers.groups()
                    if each.optimizer is optimizer
                }
            )

    @contained
    def _after_step(self, optimizer: torch.optim.Optimizer) -> None:
        if is_capturing():
            return
        groups = [group for group in self._optimizers.groups() if group.optimizer is optimizer]
        for group in groups:  # after the step: a loop may set rates in the closure of step()
            rate = self._scheduled(group)
            if rate is not None:
                self._used[group.key] = rate
        if self._probe.active:
            self._probe.after([group.key for group in groups])

    def _leap(self, step: int, loss: float | Tensor | None) -> float | None:
        """Return how far the loss leapt; on a device, one step later."""
        if isinstance(loss, Tensor):
            last, self._last_loss = self._last_loss, HostCopy(loss)
            loss = None if last is None else float(last.read())
        return None if loss is None or not math.isfinite(loss) else self.rates.note_loss(step, loss)
