"""One operation of a model, as torch's function modes show it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

IN_PLACE = {"setitem", "iadd", "isub", "imul", "itruediv"}


@dataclass(frozen=True)
class Operation:
    """A call of a torch function."""

    name: str
    """Name without underscores and namespaces; of a property, the property's."""
    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    @property
    def operands(self) -> list[Any]:
        """Arguments in order, those in a list as if they stood alone."""
        found: list[Any] = []
        for value in (*self.args, *self.kwargs.values()):
            found.extend(value) if isinstance(value, list | tuple) else found.append(value)
        return found

    def others(self, tensor: Tensor) -> list[Any]:
        """Return the arguments except ``tensor``."""
        return [value for value in self.operands if value is not tensor]

    @property
    def changes_first(self) -> bool:
        """Whether the first argument is overwritten."""
        name: str = getattr(self.function, "__name__", "")
        return (name.endswith("_") and not name.endswith("__")) or self.name in IN_PLACE

    @property
    def changed(self) -> Tensor | None:
        """Tensor that is overwritten, None for none."""
        target = self.kwargs.get("out", self.args[0] if self.args and self.changes_first else None)
        return target if isinstance(target, Tensor) else None


def operation(
    function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> Operation:
    """Return a call of a torch function as an operation."""
    name: str = getattr(function, "__name__", "")
    if name == "__get__":
        name = getattr(getattr(function, "__self__", None), "__name__", "")
    return Operation(
        name.removeprefix("special_").removeprefix("linalg_").strip("_"), function, args, kwargs
    )
