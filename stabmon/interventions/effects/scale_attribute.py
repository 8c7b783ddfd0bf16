"""Find the number by which a module multiplies its scores, and limit it in its forwards."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon._torch.callbacks.inert_hook import InertHook
from stabmon.interventions.run.score_replay import can_replay, largest_scores, replay
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.model_names import SCALES
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import AttentionCall

logger = logging.getLogger("stabmon")

MOST_TRIED = 12
"""Numbers of one module that are tried; each costs a forward."""
AGREES = 0.02
"""Relative difference of scores, and of a scale, up to which a replay shows what was foretold."""


@dataclass(frozen=True, eq=False)
class ScaleAttribute:
    """The number of an attention module that its scores are proportional to."""

    module: nn.Module
    """The attention module, in whose forward the number is read."""
    path: str
    """Name of the attribute, after that of a child where it is a child's: ``rotary.scale``."""
    is_divisor: bool = False
    """True if scores are divided by it, as by a temperature."""
    per_scale: float | None = 1.0
    """Its value where the scale of a recorded call is 1; None where that does not follow it."""

    @property
    def holder(self) -> nn.Module:
        """The module that has the attribute."""
        return self.module.get_submodule(self.path.rpartition(".")[0])

    @property
    def value(self) -> Any:
        """The number as it is now: a float, or a tensor of one value."""
        return getattr(self.holder, self.path.rpartition(".")[2])

    def replace(self, new: Any) -> None:
        """Put another object in its place."""
        setattr(self.holder, self.path.rpartition(".")[2], new)

    @torch.no_grad()
    def write(self, number: float) -> None:
        """Set it to a number; a tensor stays the same object."""
        if isinstance(value := self.value, Tensor):
            value.fill_(number)
        else:
            self.replace(number)

    def of_scale(self, scale: float) -> float:
        """Return the value at which a recorded call has ``scale``."""
        if self.per_scale is None:
            return scale
        return self.per_scale / scale if self.is_divisor else self.per_scale * scale

    def exceeds(self, limit: float) -> Any:
        """Return whether scores are larger than under ``limit``; a tensor where it is one."""
        value = self.value
        return value < limit if self.is_divisor else value > limit

    def limited(self, limit: float) -> Any:
        """Return the number, or ``limit`` where it exceeds that; in the number's own type."""
        value = self.value
        if isinstance(value, Tensor):
            return value.clamp(min=limit) if self.is_divisor else value.clamp(max=limit)
        return limit if self.exceeds(limit) else value


class AtForward:
    """Replace an attribute while its module runs, and put the same object back afterwards.

    Also where the forward raises, and where an activation checkpoint makes it again. A number that
    the forward itself writes stays.

    Args:
        attribute: the attribute.
        change: returns the value to use, given no argument; the attribute then has its own.
    """

    def __init__(self, attribute: ScaleAttribute, change: Callable[[], Any]) -> None:
        self._attribute, self._change = attribute, change
        self._replaced: list[tuple[Any, Any]] = []
        module = attribute.module
        self._handles = [
            module.register_forward_pre_hook(InertHook(self._enter, _report)),
            # before those of others that entered earlier: each finds what it has put there
            module.register_forward_hook(
                InertHook(self._leave, _report), prepend=True, always_call=True
            ),
        ]

    def remove(self) -> None:
        """Remove the hooks; may be called twice."""
        for handle in self._handles:
            handle.remove()
        self._handles = []

    def _enter(self, *_: Any) -> None:
        own, used = self._attribute.value, self._change()
        self._replaced.append((own, used))
        if used is not own:
            self._attribute.replace(used)

    def _leave(self, *_: Any) -> None:
        own, used = self._replaced.pop() if self._replaced else (None, None)
        if used is not own and self._attribute.value is used:
            self._attribute.replace(own)


def _report(error: Exception) -> None:
    logger.error("the scale of a forward is not replaced: %s", error, exc_info=error)


def find_scale(run: TrainingRun, layer: str) -> ScaleAttribute:
    """Return the number of a module by which it multiplies, or divides, its scores.

    Each number of the module and its children is halved while the step's batch runs again, the
    known names first: it is the one that halves, or doubles, the largest score of every head.
    Without a batch to run again it is a float of a known name that is the scale last measured.

    Args:
        run: the run.
        layer: the layer's name.

    Raises:
        NotApplicable: if no number does, or the run's scale is not the one last measured.
    """
    module, newest = run.module(layer), run.history.info.get(layer)
    candidates = list(_candidates(module))[:MOST_TRIED]
    known = newest.scale if newest is not None else None
    if not can_replay(run):
        named = [each for each in candidates if each.path in SCALES]
        if not named:
            raise _holds_none(module, layer)
        if known is None or not 0.5 * known < float(named[0].value) < 2.0 * known:
            raise NotApplicable(f"the scale that {layer} holds is not the one that was measured")
        return named[0]
    before = _measured(run).get(layer)
    if before is None:
        raise NotApplicable(f"{layer} does not attend on the step's batch")
    if known is not None and not 0.5 * known < before[1] < 2.0 * known:
        raise NotApplicable(f"the scale that {layer} holds is not the one that was measured")
    for each in candidates:
        own = each.value
        with _halved(each):
            after = _measured(run).get(layer)
        if after is None:
            continue
        for is_divisor, times in ((False, 0.5), (True, 2.0)):
            if _multiplied(before[0], after[0], times):
                follows = math.isclose(after[1], times * before[1], rel_tol=AGREES)
                unit = float(own) * before[1] if is_divisor else float(own) / before[1]
                return ScaleAttribute(module, each.path, is_divisor, unit if follows else None)
    raise _holds_none(module, layer)


def stored_scale(run: TrainingRun, layer: str, path: str, is_divisor: bool) -> ScaleAttribute:
    """Return the scale of a stored state.

    Args:
        run: the run.
        layer: the layer's name.
        path: of the attribute, from the layer's module.
        is_divisor: True if scores are divided by it.

    Raises:
        NotApplicable: if the module has no such number any more.
    """
    found = ScaleAttribute(run.module(layer), path, is_divisor)
    try:
        is_number = isinstance(found.value, float | Tensor)
    except AttributeError:
        is_number = False
    if not is_number:
        raise NotApplicable(f"{layer} holds no number {path} any more")
    return found


def _candidates(module: nn.Module) -> Iterator[ScaleAttribute]:
    """Yield the numbers of a module and its children, those of known names first."""
    holders = [("", module), *((f"{name}.", child) for name, child in module.named_children())]
    found = [
        f"{prefix}{name}"
        for prefix, holder in holders
        # a module's own dict of buffers, see stabmon._torch.isolation
        for name, value in (*vars(holder).items(), *holder._buffers.items())
        if _is_number(value)
    ]
    order = {name: at for at, name in enumerate(SCALES)}
    for path in sorted(found, key=lambda each: order.get(each, len(order))):
        yield ScaleAttribute(module, path)


def _is_number(value: Any) -> bool:
    """Return whether a value is a float, or a tensor of one, that is finite and above 0."""
    if isinstance(value, Tensor):
        if value.numel() != 1 or not value.is_floating_point():
            return False
    elif not isinstance(value, float):
        return False
    return 0 < float(value) < math.inf


@contextmanager
def _halved(attribute: ScaleAttribute) -> Iterator[None]:
    held = AtForward(attribute, lambda: attribute.value * 0.5)
    try:
        yield
    finally:
        held.remove()


def _measured(run: TrainingRun) -> dict[str, tuple[np.ndarray, float]]:
    """Return the largest scores ``[H]`` and the scale of each layer, on the step's batch."""
    found: dict[str, tuple[np.ndarray, float]] = {}

    def measure(call: AttentionCall) -> None:
        scores = largest_scores(call).double().cpu().numpy()
        found[call.layer] = scores, abs(float(call.scale))

    with torch.no_grad():
        replay(run, measure)
    return found


def _multiplied(before: np.ndarray, after: np.ndarray, times: float) -> bool:
    """Return whether every head's largest score became ``times`` as large."""
    known = np.isfinite(before) & (np.abs(before) > 0)
    return bool(known.any()) and bool(np.allclose(after[known], times * before[known], rtol=AGREES))


def _holds_none(module: nn.Module, layer: str) -> NotApplicable:
    return NotApplicable(
        f"{layer} ({type(module).__name__}) holds no scale that could be lowered "
        f"(no number of it multiplies its scores; known names are {', '.join(SCALES)})",
        "pass scale=… to scaled_dot_product_attention, and read it from an attribute of the module",
    )
