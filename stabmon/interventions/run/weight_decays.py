"""Cap weight decay during the optimizer's step alone."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from stabmon._torch.optimizer_adapter import ParameterGroup, parameter_groups, takes_hooks
from stabmon.interventions.run.learning_rates import step_hook


class WeightDecays:
    """Ceilings on the weight decay of parameter groups.

    Decay is lowered right before its optimizer steps, and put back right after: schedulers,
    checkpoints and loggers see the decay that they themselves set.

    Args:
        optimizers: all of the run; those that take no hooks keep their decay.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], 0.1, weight_decay=9.0)
        >>> decays = WeightDecays([optimizer])
        >>> release = decays.cap({"0.0": 0.5})
        >>> decays.used(parameter_groups([optimizer])[0]), optimizer.param_groups[0]["weight_decay"]
        (0.5, 9.0)
    """

    def __init__(self, optimizers: Sequence[Any]) -> None:
        self._optimizers = [each for each in optimizers if takes_hooks(each)]
        self._ceilings: list[Mapping[str, float]] = []
        self._held_back: dict[str, float] = {}
        self._hooks: list[Any] = []
        self._keeps_hooks = False
        self._saved: dict[int, list[tuple[ParameterGroup, Any, float]]] = {}
        """Values set and values used, by group, for optimizers in the middle of a step."""

    def scheduled(self, group: ParameterGroup) -> float | None:
        """Return the decay that the run has set, also in the middle of a step."""
        for own, before, used in self._saved.get(id(group.optimizer), ()):
            if own.settings is group.settings and group.settings.get("weight_decay") is used:
                return decay_of(before)
        return decay_of(group.settings.get("weight_decay"))

    def used(self, group: ParameterGroup) -> float | None:
        """Return the decay that a group is to use, were it not held back; None where unknown."""
        decay = self.scheduled(group)
        return None if decay is None else min(decay, *self._most(group, self._ceilings), decay)

    def cap(self, ceilings: Mapping[str, float]) -> Callable[[], None]:
        """Use no decay above these, by group key, from the next step on.

        Returns:
            A function that ends it, which may be called twice.
        """
        self._ceilings.append(held := dict(ceilings))
        self._register()

        def release() -> None:
            self._ceilings = [each for each in self._ceilings if each is not held]
            self._remove_unneeded()

        return release

    def expect_jumps(self) -> None:
        """Register the step hooks now, so that :meth:`hold_back` works in the middle of a step."""
        self._keeps_hooks = True
        self._register()

    def ignore_jumps(self) -> None:
        """Hold nothing back, and remove the step hooks unless they are needed."""
        self._keeps_hooks = False
        self._held_back = {}
        self._remove_unneeded()

    def let_go(self) -> None:
        """Hold nothing back any more."""
        self._held_back = {}

    def hold_back(self, ceilings: Mapping[str, float]) -> None:
        """Use no decay above these, by group key, from the step in progress on."""
        self._held_back.update(ceilings)
        for at in list(self._saved):
            self._change(at)

    def release_all(self) -> None:
        """Hold nothing any more, whoever asked for it."""
        self._ceilings.clear()
        self._held_back = {}
        self._remove_unneeded()

    def _most(self, group: ParameterGroup, ceilings: Sequence[Mapping[str, float]]) -> list[float]:
        return [each[group.key] for each in ceilings if group.key in each]

    def _register(self) -> None:
        for optimizer in self._optimizers if not self._hooks else ():
            change = step_hook(functools.partial(self._change, id(optimizer)))
            restore = step_hook(functools.partial(self._restore, id(optimizer)))
            self._hooks.append(optimizer.register_step_pre_hook(change))
            self._hooks.append(optimizer.register_step_post_hook(restore))

    def _remove_unneeded(self) -> None:
        if not self._ceilings and not self._keeps_hooks:
            for at in list(self._saved):
                self._restore(at)
            while self._hooks:
                self._hooks.pop().remove()

    def _change(self, at: int) -> None:
        self._restore(at)
        self._saved[at] = []
        for group in parameter_groups(self._optimizers):
            decay = group.settings.get("weight_decay")
            most = self._most(group, [*self._ceilings, self._held_back])
            known = decay_of(decay)
            if id(group.optimizer) == at and known is not None and most and known > min(most):
                group.settings["weight_decay"] = used = float(min(most))
                self._saved[at].append((group, decay, used))

    def _restore(self, at: int) -> None:
        for group, before, used in self._saved.pop(at, ()):
            if group.settings.get("weight_decay") is used:
                group.settings["weight_decay"] = before


def decay_of(value: Any) -> float | None:
    """Return a weight decay that is a plain number; None for anything else."""
    return float(value) if isinstance(value, (int, float)) else None
