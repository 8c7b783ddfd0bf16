"""Gradient scaler of a run, given or found, and the steps that it skips."""

from __future__ import annotations

import gc
import logging
import math
import sys
import weakref
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Any

import torch
from torch import Tensor

from stabmon._torch.graph_capture import is_capturing

logger = logging.getLogger("stabmon")

_SEARCHES = 8
"""Largest number of searches among the objects of the process, some 50 ms each.

Only after steps that the optimizer did not make.
"""
_FRAMES = 12
"""Callers of an optimizer's step that are examined."""
_SHORTEST_SEARCH = 10
"""Halvings that a search may take, whatever scale it begins with."""
DEFAULT_SEARCH = 16
"""Halvings from torch's first scale, 65536, to 1.

Below 1 a scale makes gradients smaller than they are without it.
"""


class ScalerWatch:
    """Gradient scaler in use for an optimizer, and whether it lets a step be made.

    A scaler that was not given is found where it calls the optimizer's step; where it never does,
    by a scale that falls at steps that the optimizer did not make. It is held weakly.

    Args:
        optimizer: a torch optimizer, a wrapper around one, several of them, or None.
        innermost: the torch optimizers inside, whose steps are watched.
        given: the scaler in use, where it is known.
    """

    def __init__(self, optimizer: Any, innermost: Sequence[Any], given: Any = None) -> None:
        self._optimizers = list(innermost)
        self._given = given if given is not None else scaler_of(optimizer)
        self._found: weakref.ref[Any] | None = None
        self._hooks: list[Any] = []
        self._made, self._found_inf = False, None
        self._is_graphed = False
        """True once a step was recorded into a CUDA graph."""
        self._scale: Tensor | None = None
        self._searches, self._scales = _SEARCHES, weakref.WeakKeyDictionary[Any, float]()

    @property
    def scaler(self) -> Any:
        """Gradient scaler in use; None where none is known, or it is not enabled."""
        known = self._given
        if known is None and self._found is not None:
            known = self._found()
        return known if known is not None and known.is_enabled() else None

    @property
    def optimizers(self) -> list[Any]:
        """The torch optimizers."""
        return self._optimizers

    def watch(self) -> None:
        """Register hooks on each optimizer's step; once is enough."""
        if not self._hooks:
            able = [each for each in self._optimizers if hasattr(each, "register_step_pre_hook")]
            self._hooks = [each.register_step_pre_hook(self._stepping) for each in able]

    def close(self) -> None:
        """Remove the hooks."""
        while self._hooks:
            self._hooks.pop().remove()

    def end_step(self) -> bool | Tensor:
        """Return whether the step that ends here was skipped.

        Of a fused optimizer, a number on its device that is above 0 if it was.
        """
        if not self._hooks:
            return self._scale_fell()
        made, found_inf = self._made, self._found_inf
        self._made, self._found_inf = False, None
        if not made and found_inf is None and self._is_graphed:
            return False  # replays of a graph call no hook: nothing is known of the step
        if not made and found_inf is None:
            self._search()
            return True
        return False if made or found_inf is None else found_inf

    def search_length(self) -> int:
        """Return the steps in a row that a search for a scale may skip.

        From the scale where it begins to 1, and no fewer than a few.
        """
        # the scale that a GradScaler was made with, which has no public name (checked with torch
        # 2.13); gone, torch's default is taken
        start = float(getattr(self.scaler, "_init_scale", 2.0**DEFAULT_SEARCH))
        factor = getattr(self.scaler, "get_backoff_factor", None)
        backoff = 0.5 if factor is None else float(factor())
        if not 0 < backoff < 1 or not math.isfinite(start) or start <= 1:
            return _SHORTEST_SEARCH
        return max(_SHORTEST_SEARCH, math.ceil(math.log(start) / -math.log(backoff)))

    def _stepping(self, optimizer: Any, *_: Any) -> None:
        try:
            self._note_step(optimizer)
        except Exception as error:  # a hook of the optimizer, whose step goes on
            logger.error("a step under a gradient scaler was not seen: %s", error)

    def _note_step(self, optimizer: Any) -> None:
        # set by a scaler on optimizers that skip by themselves
        found_inf = getattr(optimizer, "found_inf", None)
        if is_capturing():
            self._is_graphed = True  # recorded, and made by nothing yet
            return
        self._made |= found_inf is None
        self._found_inf = found_inf
        if self.scaler is None and (found := _calling_scaler()) is not None:
            self._found = weakref.ref(found)

    def _scale_fell(self) -> bool | Tensor:
        """Return whether the scale is lower than after the last step.

        For runs without a known optimizer.
        """
        # the scale on its device, None before the first step; the public get_scale waits for the
        # device. Checked with torch 2.13; gone, no step counts as skipped
        now = getattr(self.scaler, "_scale", None)
        if now is None:
            return False
        before, self._scale = self._scale, now.clone()
        # _init_scale, see search_length
        lower: Tensor = now < (self.scaler._init_scale if before is None else before)
        return lower.float()

    def _search(self) -> None:
        """Find a scaler whose scale is lower than at an earlier step that was skipped too."""
        if self.scaler is not None or not self._searches:
            return
        self._searches -= 1
        found = [each for each in gc.get_objects() if issubclass(type(each), torch.amp.GradScaler)]
        for scaler in found:
            # _scale, see _scale_fell: get_scale of a scaler that was never used is its first scale
            if scaler.is_enabled() and getattr(scaler, "_scale", None) is not None:
                scale = float(scaler.get_scale())
                if scale < self._scales.get(scaler, -math.inf):
                    self._found = weakref.ref(scaler)
                self._scales[scaler] = scale


def scaler_of(optimizer: Any) -> Any:
    """Return the scaler that an optimizer's wrapper holds, as accelerate's does.

    None where there is none.
    """
    for each in _unwrapped(optimizer):
        for name in ("scaler", "grad_scaler"):
            scaler = getattr(each, name, None)
            if hasattr(scaler, "get_scale") and hasattr(scaler, "is_enabled"):
                return scaler
    return None


def _unwrapped(optimizer: Any) -> Iterator[Any]:
    """Yield an optimizer, the one it wraps, and so on."""
    for each in optimizer if isinstance(optimizer, list | tuple) else [optimizer]:
        yield each
        while isinstance(getattr(each, "optimizer", None), torch.optim.Optimizer):
            each = each.optimizer
            yield each


def _calling_scaler() -> Any:
    """Return the scaler that is calling an optimizer's step; None where none is."""
    # GradScaler.step calls the optimizer itself or through _maybe_opt_step (checked with torch
    # 2.13); renamed, the second raises AttributeError in the optimizer's pre-hook
    codes = (torch.amp.GradScaler.step.__code__, torch.amp.GradScaler._maybe_opt_step.__code__)
    frame: FrameType | None = sys._getframe(1)
    for _ in range(_FRAMES):
        if frame is None:
            break
        if frame.f_code in codes:
            return frame.f_locals.get("self")
        frame = frame.f_back
    return None
