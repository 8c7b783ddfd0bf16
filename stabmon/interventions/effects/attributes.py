"""Change attributes of modules, and put the previous objects back."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from stabmon.interventions.effects.effect import Effect


@dataclass
class AttributesChanged(Effect):
    """Attributes of modules that are set, and put back when it is undone or released."""

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
        """Put back attributes that are still as they were set; others stay."""
        for module, name, before, now in self.changes:
            if getattr(module, name) is now:
                setattr(module, name, before)
        self.changes = []


def described(
    changes: Sequence[tuple[str, str, Any, Any]],
) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """Return values before and after by ``layer.attribute``, for the record.

    Args:
        changes: (layer, attribute, value before, value after).

    Example:
        >>> described([("attn", "p", 0.0, 0.1)])
        ({'attn.p': 0.0}, {'attn.p': 0.1})
    """
    before = {f"{layer}.{name}": value for layer, name, value, _ in changes}
    after = {f"{layer}.{name}": value for layer, name, _, value in changes}
    return before, after
