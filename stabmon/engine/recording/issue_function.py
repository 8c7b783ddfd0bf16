"""Call a user's function with each issue, without letting it change training."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from stabmon._torch.isolation import side_effect_free
from stabmon.engine.clock import StepClock
from stabmon.records import StabilityIssue

OnIssue = Callable[[StabilityIssue], Any]


def checked(on_issue: OnIssue | None) -> OnIssue | None:
    """Return ``on_issue`` if it can be called, or is None.

    Raises:
        TypeError: otherwise.
    """
    if on_issue is not None and not callable(on_issue):
        raise TypeError(
            f"on_issue is a {type(on_issue).__name__}: give a function that takes a StabilityIssue"
        )
    return on_issue


class IssueFunction:
    """A user's function, given each issue as it is emitted.

    Random generators, buffers and attributes of modules, train or eval mode and gradient mode are
    restored afterwards, and each issue is a copy. An exception is counted, and logged the first
    time.

    Args:
        function: takes a :class:`~stabmon.records.StabilityIssue`; its result is not used.
        model: the model that trains.
        clock: does not record forwards that the function makes, and has the boundary that counts
            what fails.
    """

    def __init__(self, function: OnIssue, model: nn.Module, clock: StepClock) -> None:
        self._function, self._model, self._clock = function, model, clock

    def __call__(self, issues: Sequence[StabilityIssue]) -> None:
        """Call the function with each issue of a step."""
        if not issues:
            return
        with self._clock.own_work(), side_effect_free(self._model):
            for issue in issues:
                try:
                    self._function(copy.deepcopy(issue))
                except Exception as error:
                    self._clock.boundary.failed("on_issue", error)
