"""Change attributes of modules, and put back the very objects that were there."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stabmon.interventions.effects.effect import Effect


@dataclass
class AttributesChanged(Effect):
    """Attributes of modules that were set, and are put back when the act is undone or released."""

    changes: Sequence[tuple[nn.Module, str, Any, Any]] = field(default_factory=list)
    """(module, attribute, value before, value now)."""

    def __post_init__(self) -> None:
        for module, name, _, now in self.changes:
            setattr(module, name, now)

    def undo(self) -> bool:
        kept = [getattr(module, name) is now for module, name, _, now in self.changes]
        self.release()
        return all(kept)

    def release(self) -> None:
        """Put back what is still as it was set; what somebody has set anew since stays."""
        for module, name, before, now in self.changes:
            if getattr(module, name) is now:
                setattr(module, name, before)
        self.changes = []


def described(
    changes: Sequence[tuple[str, str, Any, Any]],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Before and after by ``layer.attribute``, for the record."""
    before = {f"{layer}.{name}": value for layer, name, value, _ in changes}
    after = {f"{layer}.{name}": value for layer, name, _, value in changes}
    return before, after
