"""What a rule is, and the table of all rules."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import TYPE_CHECKING, Protocol, TypeVar

from stabmon.records import StabilityIssue
from stabmon.registry import Registry

if TYPE_CHECKING:
    from stabmon.rules.history import History


class Rule(Protocol):
    """A frozen dataclass whose fields are its levels, and whose ``check`` says what is ill now."""

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Every issue of this rule's type that holds at the history's newest reading.

        Called once a sampled step for all heads of the model at once: compute on whole ``[T, N]`` arrays
        and build a :class:`StabilityIssue` only for the heads that are ill. Hysteresis: for a head whose issue is open already
        (``history.is_open(issue_type)``) use the milder, closing level. Never raises on NaN, inf or a short history.
        """
        ...


RULES: Registry[type[Rule]] = Registry("rule", package="stabmon.rules")
R = TypeVar("R", bound=type)


def rule(cls: R) -> R:
    """Register a rule under its class name in snake case: ``EntropyCollapse`` is ``entropy_collapse``."""
    RULES.register(re.sub(r"(?<!^)(?=[A-Z])", "_", cls.__name__).lower(), cls)
    return cls
