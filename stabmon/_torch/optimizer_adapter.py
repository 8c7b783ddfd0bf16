"""Optimizers of a run, in any number and any wrappers, and its gradient scaler."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Mapping, MutableMapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from stabmon._torch.callbacks.inert_hook import InertHook
from stabmon._torch.grad_scaler import ScalerWatch

SEVERAL = ("optimizers", "chained_optimizers", "_optimizers")
"""Attributes of containers of optimizers (torchtitan, Megatron, fairseq)."""
WRAPPED = ("optimizer", "base_optimizer", "_optimizer")
"""Attributes of wrappers for the optimizer inside.

Of accelerate, Lightning, DeepSpeed and SAM.
"""

_DEEPEST = 5
"""Wrappers around wrappers that are opened.

An object with an attribute of every name has no end.
"""


def innermost(given: Any) -> list[Any]:
    """Find the optimizers that step parameters themselves.

    Args:
        given: an optimizer, a wrapper around one, something that holds several, or a list, tuple or
            mapping of these; None for none.

    Returns:
        Each once, in the order in which they were given.

    Example:
        >>> adam = torch.optim.Adam([torch.zeros(2, requires_grad=True)])
        >>> innermost({"all": [adam, adam]}) == [adam]
        True
    """
    return list({id(each): each for each in _search(given, set())}.values())


def _search(given: Any, seen: set[int]) -> list[Any]:
    if given is None or id(given) in seen or len(seen) > _DEEPEST:
        return []
    if isinstance(given, Mapping):
        given = list(given.values())
    if isinstance(given, list | tuple):
        return [found for each in given for found in _search(each, seen)]
    seen = seen | {id(given)}
    for name in (*SEVERAL, *WRAPPED):
        held = _attribute(given, name)
        if isinstance(held, Mapping | list | tuple) or hasattr(held, "__dict__"):
            inside = _search(held, seen)
            if inside:
                return inside
    return [given] if hasattr(given, "param_groups") or hasattr(given, "step") else []


def _attribute(given: Any, name: str) -> Any:
    try:
        return getattr(given, name, None)
    except Exception:  # a property of a wrapper may raise anything
        return None


def _is_optimizer(given: Any) -> bool:
    optimizer = isinstance(given, torch.optim.Optimizer)
    return optimizer or (hasattr(given, "param_groups") and hasattr(given, "step"))


@dataclass(frozen=True, eq=False)
class ParameterGroup:
    """One parameter group of one of the run's optimizers."""

    key: str
    """``<optimizer>.<group>``, both counted from 0 in the order given.

    The same over restarts.
    """
    optimizer: Any
    settings: MutableMapping[str, Any]
    """The optimizer's own entry in ``param_groups``."""

    @property
    def rate(self) -> float | None:
        """Learning rate at present; None where the optimizer makes its own.

        As Adafactor does with relative steps.
        """
        return as_rate(self.settings.get("lr"))

    @property
    def parameters(self) -> list[Tensor]:
        """Parameters that the group steps."""
        return list(self.settings.get("params", ()))


def as_rate(value: Any) -> float | None:
    """Return a rate as a number, stored as one or as a tensor; None for anything else."""
    try:
        if isinstance(value, Tensor) and value.device.type != "cpu":
            return read_once(value)
        return None if value is None else float(value)
    except (TypeError, ValueError, RuntimeError):
        return None


_rates_read: dict[int, tuple[weakref.ref[Tensor], int, float]] = {}
"""Rates on a device as they were last read: by ``id``, with the tensor's version."""


def read_once(rate: Tensor) -> float:
    """Return a rate that is stored as a tensor, read from its device once until it is changed.

    Each read waits for the device, and several places ask for a rate in every step.

    Args:
        rate: a tensor of one number.

    Example:
        >>> read_once(torch.tensor(0.5))
        0.5
    """
    if rate.is_inference():  # without a version counter a change would go unnoticed
        return float(rate)
    known = _rates_read.get(id(rate))
    if known is not None and known[0]() is rate and known[1] == rate._version:
        return known[2]
    for at in [at for at, (tensor, *_) in _rates_read.items() if tensor() is None]:
        del _rates_read[at]
    value = float(rate)
    _rates_read[id(rate)] = weakref.ref(rate), rate._version, value
    return value


def parameter_groups(optimizers: list[Any]) -> list[ParameterGroup]:
    """List the parameter groups of innermost optimizers."""
    return [
        ParameterGroup(f"{number}.{at}", optimizer, group)
        for number, optimizer in enumerate(optimizers)
        if isinstance(groups := _attribute(optimizer, "param_groups"), list | tuple)
        for at, group in enumerate(groups)
    ]


def takes_hooks(optimizer: Any) -> bool:
    """Return True if an optimizer takes hooks around its step.

    As torch's own optimizers and their subclasses do.
    """
    # made by Optimizer.__init__, which some wrappers never call, so that register_step_pre_hook
    # raises (checked with torch 2.13); renamed, no optimizer would take hooks
    return hasattr(optimizer, "_optimizer_step_pre_hooks")


def state_of(optimizer: Any) -> Any:
    """Return an optimizer's state of its parameters; empty where none is visible."""
    # torch's ZeroRedundancyOptimizer has the state of this rank's parameters there
    local = _attribute(optimizer, "optim")
    return getattr(local if _is_optimizer(local) else optimizer, "state", {})


class OptimizerAdapter:
    """Read-only view of a run's optimizers.

    Args:
        optimizer: anything that :func:`innermost` takes.
        grad_scaler: the gradient scaler in use; None to find it, if there is one.
    """

    def __init__(self, optimizer: Any, grad_scaler: Any = None) -> None:
        self.optimizer = optimizer
        self._innermost: list[Any] | None = innermost(optimizer)
        self.scalers = ScalerWatch(optimizer, self._innermost, grad_scaler)
        self._rates: dict[str, float] = {}
        self._hooks: list[Any] = []

    @property
    def optimizers(self) -> list[Any]:
        """The torch optimizers inside, searched once a step."""
        if self._innermost is None:
            self._innermost = innermost(self.optimizer)
        return self._innermost

    @property
    def grad_scaler(self) -> Any:
        """Gradient scaler in use, given or found; None where none is known."""
        return self.scalers.scaler

    @property
    def scales(self) -> bool:
        """True if a gradient scaler is in use."""
        return self.grad_scaler is not None

    @property
    def skips_bad_steps(self) -> bool:
        """True if the run skips steps with bad gradients by itself.

        By a scaler, or by a flag that was set on a fused optimizer.
        """
        return self.scales or any(
            _attribute(each, "found_inf") is not None for each in self.optimizers
        )

    def scale(self) -> float | None:
        """Return the gradient scaler's factor; None without one. Waits for the device."""
        return float(self.grad_scaler.get_scale()) if self.scales else None

    def left_out(self) -> bool | Tensor:
        """Return whether the step that ends here was skipped; to be called once a step.

        See :meth:`ScalerWatch.end_step`.
        """
        return self.scalers.end_step()

    def groups(self) -> list[ParameterGroup]:
        """Return every parameter group of every optimizer."""
        return parameter_groups(self.optimizers)

    def start_step(self) -> None:
        """Reset the last step's rates, and the list of optimizers."""
        self._rates, self._innermost = {}, None

    def note_rates(
        self, optimizer: Any, scheduled: Callable[[ParameterGroup], float | None]
    ) -> None:
        """Keep the rates of a step that is about to be made.

        Schedulers move on before the step is examined.

        Args:
            optimizer: the one that is about to step; None for all.
            scheduled: returns the rate that a group's scheduler has set.
        """
        _rates_read.clear()  # a write past the version counter is seen at the next sampled step
        stepping = innermost(optimizer)
        for group in self.groups():
            if not stepping or any(group.optimizer is each for each in stepping):
                rate = scheduled(group)
                if rate is not None:
                    self._rates[group.key] = rate

    def learning_rates(self) -> dict[str, float]:
        """Return the scheduled rate of each parameter group.

        That of this step where it was noted, else the present one.
        """
        rates = {group.key: self._rates.get(group.key, group.rate) for group in self.groups()}
        return {key: rate for key, rate in rates.items() if rate is not None}

    def before_step(
        self, notify: Callable[[Any], None], on_error: Callable[[Exception], None]
    ) -> None:
        """Call a function before each step of each optimizer from now on; once is enough.

        Args:
            notify: called with the optimizer that is about to step.
            on_error: called with what it raises, of which the step sees nothing.
        """
        if not self._hooks:
            hook = InertHook(lambda stepping, *_: notify(stepping), on_error)
            self._hooks = [
                each.register_step_pre_hook(hook) for each in self.optimizers if takes_hooks(each)
            ]

    def close(self) -> None:
        """Remove the hooks."""
        self.scalers.close()
        while self._hooks:
            self._hooks.pop().remove()
