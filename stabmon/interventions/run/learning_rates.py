"""Change learning rates during the optimizer's step alone."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.optimizer_adapter import ParameterGroup, as_rate, parameter_groups, takes_hooks

logger = logging.getLogger("stabmon")


failed_hooks: list[str] = []
"""Failures in hooks of optimizers since they were last looked at, in words."""


def step_hook(callback: Callable[[], None]) -> Callable[..., None]:
    """Return a hook for an optimizer's step that never raises into the step.

    A callback that fails is logged once, and not called again.
    """
    failed = False

    def hook(*_: Any) -> None:
        nonlocal failed
        try:
            if not failed and not is_capturing():
                callback()
        except Exception as error:
            failed = True
            failed_hooks.append(f"{type(error).__name__}: {error}")
            logger.error(
                "A held intervention failed at the optimizer's step and is left out: %s",
                error,
                exc_info=error,
            )

    return hook


@dataclass(frozen=True, eq=False)
class _Change:
    """The rate of one group while its optimizer steps."""

    group: ParameterGroup
    before: Any
    """The rate as it was scheduled: the object itself, or a copy of a tensor changed in place."""
    used: Any
    in_place: bool
    version: int = 0
    """Of a tensor that is changed in place, once it has been changed."""

    @classmethod
    @torch.no_grad()
    def make(cls, group: ParameterGroup, share: float, *, in_place: bool) -> _Change:
        """Multiply the rate of a group by ``share``.

        Args:
            group: the group.
            share: the factor.
            in_place: write into the tensor that holds the rate. Compiled code and CUDA graphs read
                that tensor, and optimizers want it on the device where it is.
        """
        rate = group.settings["lr"]
        if not in_place:
            group.settings["lr"] = used = rate * share
            return cls(group, rate, used, in_place)
        before = rate.detach().clone()
        rate.mul_(share)
        return cls(group, before, rate, in_place, rate._version)

    @property
    def is_in_force(self) -> bool:
        """Nobody has set the rate since."""
        is_same = self.group.settings.get("lr") is self.used
        return is_same and (not self.in_place or self.used._version == self.version)

    @property
    def scheduled(self) -> float | None:
        """The rate as it was scheduled."""
        return as_rate(self.before)

    @torch.no_grad()
    def undo(self) -> None:
        """Put the scheduled rate back, unless somebody has set another one."""
        if not self.is_in_force:
            return
        if self.in_place:
            self.used.copy_(self.before)
        else:
            self.group.settings["lr"] = self.before


Factors = Mapping[str, Callable[[], float]] | Callable[[ParameterGroup], float | None]
"""Factors by group key, or a function of the group that returns None for groups without one."""
Ceilings = Mapping[str, float | Callable[[], float]] | Callable[[ParameterGroup], float | None]
"""Largest rates by group key, or a function as for ``Factors``."""


class LearningRates:
    """Factors and ceilings on the rates of parameter groups.

    Rates are changed right before their optimizer steps, and the same objects are put back right
    after.

    The rate used of a group is ``min(scheduled * factors, ceilings) * ramps``: factors and ramps
    multiply, ceilings do not add up, and a warm-up (a ramp) takes its whole length also under a
    ceiling.

    Schedulers, checkpoints and loggers see the rates that they themselves set. The step hooks are
    in the optimizers only while a factor or ceiling is held; they come in a pair also where a
    gradient scaler skips steps (then neither is called) and where the step takes a closure (rates
    are read after it). After a step that raised, rates are put back before the next one.

    Args:
        optimizers: all of the run, as :func:`~stabmon._torch.optimizer_adapter.innermost` lists
            them; those that take no hooks keep their rates.
        on_gradients: registers a function to be called when gradients are ready, which may be in
            the middle of a step; returns a function that removes it.

    Example:
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=0.1)
        >>> rates = LearningRates([optimizer])
        >>> release = rates.hold(lambda: 0.5)
        >>> rates.factor, optimizer.param_groups[0]["lr"]
        (0.5, 0.1)
        >>> release()
        >>> rates.factor
        1
    """

    def __init__(
        self,
        optimizers: Sequence[Any],
        on_gradients: Callable[[Callable[[], None]], Callable[[], None]] = lambda call: (
            lambda: None
        ),
    ) -> None:
        self._optimizers = list(optimizers)
        self._on_gradients = on_gradients
        self._end: Callable[[], None] = lambda: None
        self._factors: list[_ByGroup] = []
        self._ceilings: list[_ByGroup] = []
        self._ramps: list[_ByGroup] = []
        self._held_back: dict[str, float] = {}
        self._keeps_hooks = False
        self._stepping: set[int] = set()
        """Optimizers in the middle of a step, by ``id``."""
        self._hooks: list[Any] = []
        self._saved: dict[int, list[_Change]] = {}
        self._in_use: dict[str, float] = {}

    @property
    def factor(self) -> float:
        """Smallest share of its scheduled rate that any group uses at the next step."""
        return min((self._share(group) for group in self.groups()), default=1.0)

    @property
    def in_use(self) -> dict[str, float]:
        """Share of its scheduled rate that each group used last; 1 is left out."""
        return {key: share for key, share in self._in_use.items() if share != 1}

    def groups(self) -> list[ParameterGroup]:
        """Return every parameter group whose rate can be changed."""
        return [
            group for group in parameter_groups(self._optimizers) if takes_hooks(group.optimizer)
        ]

    def scheduled(self, group: ParameterGroup) -> float | None:
        """Return the rate that the scheduler has set, also in the middle of a step."""
        for change in self._saved.get(id(group.optimizer), ()):
            if change.group.settings is group.settings and change.is_in_force:
                return change.scheduled
        return group.rate

    def hold(self, factor: Callable[[], float], *, ramp: bool = False) -> Callable[[], None]:
        """Multiply all groups' rates by ``factor()`` at each step from now on.

        Args:
            factor: returns the factor; called at each step.
            ramp: it is a warm-up, which multiplies the rate that the ceilings leave.

        Returns:
            A function that ends it, which may be called twice.
        """
        return self._add(self._ramps if ramp else self._factors, lambda _: factor())

    def hold_groups(self, factors: Factors, *, ramp: bool = False) -> Callable[[], None]:
        """Multiply the rates of some groups from now on, each by its own factor.

        Groups given by key are recognised by their parameters from then on, also where the
        optimizer's groups are replaced.

        Args:
            factors: the factors, see ``Factors``.
            ramp: they are a warm-up, see :meth:`hold`.

        Returns:
            A function that ends it, which may be called twice.
        """
        return self._add(self._ramps if ramp else self._factors, self._by_parameter(factors))

    def cap(self, ceilings: Ceilings) -> Callable[[], None]:
        """Use no rate above the ceiling of its group from now on.

        Args:
            ceilings: the largest rates, see ``Ceilings``.

        Returns:
            A function that ends it, which may be called twice.
        """
        return self._add(self._ceilings, self._by_parameter(ceilings))

    def expect_jumps(self) -> None:
        """Register the step hooks now, so that :meth:`hold_back` works in the middle of a step."""
        self._keeps_hooks = True
        self._register()

    def ignore_jumps(self) -> None:
        """Hold nothing back, and remove the step hooks unless they are needed."""
        self._keeps_hooks = False
        self.let_go()
        self._remove_unneeded()

    def let_go(self) -> None:
        """Hold nothing back any more."""
        self._held_back = {}

    def hold_back(self, ceilings: Mapping[str, float]) -> dict[str, float]:
        """Use no rate above these, by group key, from the step in progress on.

        Args:
            ceilings: the largest rates; infinity to hold a group back no longer.

        Returns:
            The share of its rate that each group is held back to.
        """
        self._held_back.update(ceilings)
        for at in list(self._stepping):
            self._change(at)
        return {
            group.key: self._share(group) / share
            for group in self.groups()
            if group.key in ceilings and (share := self.share(group)) > 0
        }

    def share(self, group: ParameterGroup) -> float:
        """Return the share of its scheduled rate that a group is to use, were it not held back."""
        share = _product(self._factors, group)
        ceilings = [most for ceiling in self._ceilings if (most := ceiling(group)) is not None]
        if (
            ceilings
            and (rate := self.scheduled(group)) is not None
            and rate * share > min(ceilings)
        ):
            share = min(ceilings) / rate
        return share * _product(self._ramps, group)

    def _add(self, held: list[_ByGroup], each: _ByGroup) -> Callable[[], None]:
        held.append(each)
        self._register()
        own = [each]  # not kept once it is released: who holds the function returned may own it

        def release() -> None:
            while own:
                if (mine := own.pop()) in held:
                    held.remove(mine)
            self._remove_unneeded()

        return release

    def _register(self) -> None:
        if not self._hooks:
            self._end = self._on_gradients(self._change_new_rates)
            for optimizer in filter(takes_hooks, self._optimizers):
                at = id(optimizer)
                self._hooks += [
                    optimizer.register_step_pre_hook(
                        step_hook(functools.partial(self._change, at))
                    ),
                    optimizer.register_step_post_hook(
                        step_hook(functools.partial(self._end_step, at))
                    ),
                ]

    def _remove_unneeded(self) -> None:
        if self._factors or self._ceilings or self._ramps:
            return
        for at in list(self._saved):
            self._restore(at)
        self._in_use = {}
        if not self._keeps_hooks:
            while self._hooks:
                self._hooks.pop().remove()
            self._end()

    def release_all(self) -> None:
        """Hold nothing any more, whoever asked for it."""
        for held in (self._factors, self._ceilings, self._ramps):
            held.clear()
        self._remove_unneeded()

    def _change_new_rates(self) -> None:
        """Change rates that were set within a step, as by its closure."""
        for at, saved in list(self._saved.items()):
            if not all(change.is_in_force for change in saved):
                self._change(at)

    def _share(self, group: ParameterGroup) -> float:
        share, most = self.share(group), self._held_back.get(group.key)
        if most is None or (rate := self.scheduled(group)) is None or rate * share <= most:
            return share
        return most / rate

    def _end_step(self, at: int) -> None:
        self._stepping.discard(at)
        self._restore(at)

    def _change(self, at: int) -> None:
        self._restore(at)
        self._stepping.add(at)
        groups = [
            group
            for group in self.groups()
            if id(group.optimizer) == at and group.settings.get("lr") is not None
        ]
        shares = [self._share(group) for group in groups]  # of all before any is changed
        rates = [group.settings["lr"] for group in groups]
        alike: dict[int, set[float]] = {}  # torch hands one tensor to all groups
        for rate, share in zip(rates, shares, strict=True):
            alike.setdefault(id(rate), set()).add(share)
        changes: dict[int, _Change] = {}
        for group, rate, share in zip(groups, rates, shares, strict=True):
            self._in_use[group.key] = share
            if share == 1 and isinstance(rate, Tensor):
                continue
            change = changes.get(id(rate))
            if change is None or not change.in_place:
                in_place = isinstance(rate, Tensor) and len(alike[id(rate)]) == 1
                change = _Change.make(group, share, in_place=in_place)
            changes[id(rate)] = change = replace(change, group=group)
            self._saved.setdefault(at, []).append(change)

    def _restore(self, at: int) -> None:
        for change in self._saved.pop(at, ()):
            change.undo()

    def _by_parameter(self, given: Factors | Ceilings) -> _ByGroup:
        if callable(given):
            return lambda group: given(group)  # of its own, so that each hold ends by itself
        members = [
            (each, given[group.key])
            for group in self.groups()
            if group.key in given
            for each in group.parameters
        ]
        # kept with the parameter itself: its id is used again once it is gone
        values = {id(each): (each, value) for each, value in members}

        def of_group(group: ParameterGroup) -> float | None:
            own = {
                id(entry[1]): entry[1]
                for each in group.parameters
                if (entry := values.get(id(each))) is not None
            }
            return min(
                (float(value() if callable(value) else value) for value in own.values()),
                default=None,
            )

        return of_group


_ByGroup = Callable[[ParameterGroup], float | None]


def _product(held: Sequence[_ByGroup], group: ParameterGroup) -> float:
    return math.prod(factor for each in held if (factor := each(group)) is not None)
