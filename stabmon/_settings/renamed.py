"""Keep old names of settings working for one release, with a warning that says the new one."""

from __future__ import annotations

import functools
import inspect
import warnings
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

C = TypeVar("C", bound=type)


def renamed(**names: str) -> Callable[[C], C]:
    """Let a dataclass take old names of its settings, old name = new name.

    Both the reader and the constructor accept the old name, with a ``FutureWarning``. To be written
    above ``@dataclass``.

    Example:
        >>> from dataclasses import dataclass
        >>> @renamed(hold="release_after")
        ... @dataclass(frozen=True)
        ... class Limits:
        ...     release_after: int = 20
        >>> import warnings
        >>> with warnings.catch_warnings(record=True) as told:
        ...     warnings.simplefilter("always")
        ...     limits = Limits(hold=3)
        >>> limits.release_after, str(told[0].message)
        (3, 'stabmon: Limits: hold is now release_after, the old name works for one more release')
    """

    def declare(cls: C) -> C:
        made = cls.__init__  # type: ignore[misc]

        @functools.wraps(made)
        def init(self: Any, *args: Any, **kwargs: Any) -> None:
            made(
                self,
                *args,
                **current_names(cls, kwargs, lambda text: TypeError(f"{cls.__name__}: {text}")),
            )

        cls.__init__ = init  # type: ignore[misc]
        cls.__renamed_settings__ = names  # type: ignore[attr-defined]
        return cls

    return declare


def renamed_settings(cls: type) -> Mapping[str, str]:
    """Return the current name of each old name that :func:`renamed` declared for ``cls``."""
    names: Mapping[str, str] = getattr(cls, "__renamed_settings__", {})
    return names


def current_names(
    cls: type, values: Mapping[str, Any], located: Callable[[str], Exception]
) -> Mapping[str, Any]:
    """Return ``values`` under the current names of the settings of ``cls``.

    Args:
        cls: class that :func:`renamed` may have declared.
        values: values by name, old or new.
        located: makes an error of a text, with the place in front of it.

    Raises:
        Exception: what ``located`` makes, if a setting is given under both names.
    """
    names = renamed_settings(cls)
    if not names.keys() & values.keys():
        return values
    for old in names.keys() & values.keys():
        if names[old] in values:
            raise located(f"{old} is the old name of {names[old]}, which is given too: give one")
        text = located(f"{old} is now {names[old]}, the old name works for one more release")
        warnings.warn(
            f"stabmon: {text}",
            FutureWarning,
            stacklevel=_levels_within_stabmon(),
        )
    return {names.get(name, name): value for name, value in values.items()}


def _levels_within_stabmon() -> int:
    """Return the ``stacklevel`` of the first caller outside stabmon."""
    frame, level = inspect.currentframe(), 0
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] == "stabmon":
        frame, level = frame.f_back, level + 1
    return level
