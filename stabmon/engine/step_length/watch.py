"""Watch the length of a run's steps: what is told at each mark of a step, and what follows from
it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.optimizer_adapter import OptimizerAdapter, ParameterGroup, takes_hooks
from stabmon.engine.error_boundary import ErrorBoundary, contained
from stabmon.engine.gradients import AfterBackward
from stabmon.engine.step_length.probe import StepProbe
from stabmon.engine.step_length.rate_watch import RateWatch
from stabmon.records import Overshoot


class StepLength:
    """Tells when steps are too long: see :class:`RateWatch` for when, :class:`StepProbe` for how it
    is measured.

    Changes nothing: parameters are bit for bit where the optimizer left them, gradients and random
        generators untouched.

    Args:
        model: the model that trains.
        view: its optimizers.
        scheduled: the rate of a group as its scheduler has set it.
        factors: the share of its scheduled rate that each group used in the newest step, where it
            is not 1.
        boundary: told what fails.
    """

    def __init__(
        self,
        model: nn.Module,
        view: OptimizerAdapter,
        scheduled: Callable[[ParameterGroup], float | None],
        factors: Callable[[], Mapping[str, float]],
        boundary: ErrorBoundary,
    ) -> None:
        self.boundary = boundary
        self.rates = RateWatch()
        self._model, self._view, self._scheduled, self._factors = model, view, scheduled, factors
        self._probe = StepProbe(model)
        self._after_backward = AfterBackward(self._backward_ended)
        self._hooks: list[Any] = []
        self._used: dict[str, float] = {}
        self._last_loss: Tensor | None = None

    @contained
    def begin(self, step: int, probe: bool) -> None:
        """``step`` begins; without ``probe`` it is only followed by its rates and its loss."""
        self.end()
        if not self._hooks:
            self._watch()
        now = {
            group.key: rate
            for group in self._view.groups()
            if (rate := self._scheduled(group)) is not None
        }
        factors = self._factors()
        now = {key: rate * factors.get(key, 1.0) for key, rate in now.items()}
        self._used = {key: max(rate, self._used.get(key, 0.0)) for key, rate in now.items()}
        self._probe.begin(probe and bool(self._hooks) and self.rates.wants(step, self._used))
        if self._probe.active:
            self._after_backward.watch(self._model)
        self._used = {}

    @contained
    def follow(self, call: ForwardCall | None, output: Any) -> None:
        """A training forward has returned; ``call`` makes it again, where it was kept."""
        self._probe.follow(call, output)

    @contained
    def finish(self, step: int, loss: float | Tensor | None) -> Overshoot | None:
        """The optimizers have made ``step``; what shows that it, or the one before, was too
        long.
        """
        factors = self._factors()
        self._used = {key: rate * factors.get(key, 1.0) for key, rate in self._used.items()}
        quality = self._probe.quality(step) if self._probe.active else None
        if (
            self._probe.active
            and (how := self.rates.judge(quality, self._used)) is not None
            and quality is not None
        ):
            found = self._probe.fitting()
            if any(factor < 1 for factor in found.values()):
                news = self.rates.conclude(
                    step, how, self._used, found, gain_ratio=quality.gain_ratio, rise=quality.rise
                )
                return None if how == "brisk" else news
        leapt = self._leap(step, loss)
        return None if leapt is None or not self._used else self.rates.torn(step, leapt, self._used)

    def shorten(self, factors: Mapping[str, float]) -> Callable[[], None] | None:
        """Shorten the step that was just made, by a factor a group; returns what puts it back, None
        where it was not probed.
        """
        return self._probe.shorten(factors) if self._probe.active else None

    def end(self) -> None:
        """Keep nothing of the step."""
        self._after_backward.let_go()
        self._probe.end()

    def let_go(self) -> None:
        """Take every hook out again; may be called twice."""
        self.end()
        while self._hooks:
            self._hooks.pop().remove()

    def _watch(self) -> None:
        for optimizer in {
            id(group.optimizer): group.optimizer for group in self._view.groups()
        }.values():
            if takes_hooks(optimizer):
                self._hooks += [
                    optimizer.register_step_pre_hook(lambda stepping, *_: self._steps(stepping)),
                    optimizer.register_step_post_hook(lambda stepping, *_: self._stepped(stepping)),
                ]

    @contained
    def _steps(self, optimizer: torch.optim.Optimizer) -> None:
        if self._probe.active:
            self._probe.before(
                {
                    each.key: each.parameters
                    for each in self._view.groups()
                    if each.optimizer is optimizer
                }
            )

    @contained
    def _stepped(self, optimizer: torch.optim.Optimizer) -> None:
        groups = [group for group in self._view.groups() if group.optimizer is optimizer]
        for (
            group
        ) in groups:  # not before the step: a loop may set rates in the closure that it calls
            rate = self._scheduled(group)
            if rate is not None:
                self._used[group.key] = rate
        if self._probe.active:
            self._probe.after([group.key for group in groups])

    @contained
    def _backward_ended(self, _: dict[int, Tensor]) -> None:
        self._probe.backward_ended()

    def _leap(self, step: int, loss: float | Tensor | None) -> float | None:
        """A loss on another device is looked at one step later, when reading it waits for
        nothing.
        """
        if isinstance(loss, Tensor):
            last, self._last_loss = self._last_loss, loss
            loss = None if last is None else float(last)
        return None if loss is None or not math.isfinite(loss) else self.rates.note_loss(step, loss)
