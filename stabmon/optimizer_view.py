"""What a monitor reads of an optimizer, whatever wraps it, and of a gradient scaler."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabmon.grad_scaler import ScalerWatch


class OptimizerView:
    """Reads, and changes nothing.

    Args:
        optimizer: a torch optimizer, accelerate's wrapper around one, or None.
        grad_scaler: the gradient scaler in use; None to find it, if there is one.
    """

    def __init__(self, optimizer: Any, grad_scaler: Any = None) -> None:
        self.optimizer = optimizer
        self.scalers = ScalerWatch(optimizer, grad_scaler)
        self._hook: Any = None

    @property
    def grad_scaler(self) -> Any:
        """The gradient scaler in use, given or found; None where none is known."""
        return self.scalers.scaler

    @property
    def scales(self) -> bool:
        """Whether a gradient scaler is at work."""
        return self.grad_scaler is not None

    @property
    def skips_bad_steps(self) -> bool:
        """Whether steps with bad gradients are skipped without our doing: by a scaler, or by what has told a fused optimizer of them."""
        return self.scales or getattr(self._inner(), "found_inf", None) is not None

    def scale(self) -> float | None:
        """What the gradient scaler multiplies gradients by; None without one. Waits for the device."""
        return float(self.grad_scaler.get_scale()) if self.scales else None

    def left_out(self) -> bool | Tensor:
        """Whether the step that ends here was left out, see :meth:`ScalerWatch.end_step`; to be asked once a step."""
        return self.scalers.end_step()

    def learning_rate(self) -> float | None:
        """The largest over the parameter groups, as scheduled."""
        groups = getattr(self.optimizer, "param_groups", None)
        return max(float(group["lr"]) for group in groups) if groups else None

    def before_step(self, tell: Callable[[], None]) -> None:
        """Call ``tell`` before each step from now on; once is enough."""
        register = getattr(self._inner(), "register_step_pre_hook", None)
        if register is not None and self._hook is None:
            self._hook = register(lambda *_: tell())

    def let_go(self) -> None:
        """Take the hooks out again."""
        self.scalers.let_go()
        if self._hook is not None:
            self._hook.remove()
            self._hook = None

    def _inner(self) -> Any:
        optimizer = self.optimizer
        while isinstance(getattr(optimizer, "optimizer", None), torch.optim.Optimizer):
            optimizer = optimizer.optimizer
        return optimizer
