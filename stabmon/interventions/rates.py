"""Factors on the learning rates that no scheduler undoes: there during the optimizer's step and at no other time."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

import torch

logger = logging.getLogger("stabmon")


def step_hook(act: Callable[[], None]) -> Callable[..., None]:
    """A hook for an optimizer's step that does ``act`` and never raises into the step: what fails is told once, and not done again."""
    failed = False

    def hook(*_: Any) -> None:
        nonlocal failed
        if failed:
            return
        try:
            act()
        except Exception as error:
            failed = True
            logger.error("A held intervention failed at the optimizer's step and is left out: %s", error, exc_info=error)

    return hook


class LearningRates:
    """Multiplies the rates of all parameter groups right before the optimizer steps and puts the same objects back right after.

    Schedulers, checkpoints and loggers therefore see the rates that they themselves set. The step hooks are in the optimizer only
    while somebody holds a factor; they come in a pair also where a gradient scaler skips steps (then neither is called) and
    where the step takes a closure (rates are read after it). A step that raises is mended before the next one.

    Args:
        optimizer: a torch optimizer.
    """

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self._optimizer = optimizer
        self._factors: list[Callable[[], float]] = []
        self._hooks: list[Any] = []
        self._saved: list[tuple[dict[str, Any], Any, Any]] = []

    @property
    def factor(self) -> float:
        """The product of all factors at the next step: the rate used is the scheduler's times this."""
        product = 1.0
        for factor in self._factors:
            product *= factor()
        return product

    def hold(self, factor: Callable[[], float]) -> Callable[[], None]:
        """Multiply by ``factor()`` at each step from now on; returns what ends it, which may be called twice."""
        self._factors.append(factor)
        if not self._hooks:
            self._hooks = [
                self._optimizer.register_step_pre_hook(step_hook(self._multiply)),
                self._optimizer.register_step_post_hook(step_hook(self._restore)),
            ]

        def release() -> None:
            if factor in self._factors:
                self._factors.remove(factor)
            if not self._factors:
                self._restore()
                while self._hooks:
                    self._hooks.pop().remove()

        return release

    def _multiply(self) -> None:
        self._restore()
        factor = self.factor
        for group in self._optimizer.param_groups:
            scheduled, used = group["lr"], group["lr"] * factor
            self._saved.append((group, scheduled, used))
            group["lr"] = used

    def _restore(self) -> None:
        while self._saved:
            group, scheduled, used = self._saved.pop()
            if group["lr"] is used:
                group["lr"] = scheduled
