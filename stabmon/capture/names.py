"""Names of a model's modules, whatever wraps the model or lies in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from stabmon.model_names import LEADING_WRAPPERS, PEFT_WRAPPERS, WRAPPERS


def clean_name(name: str) -> str:
    """Return a qualified name as the model's author wrote it, without wrappers' parts.

    Args:
        name: qualified name of a module or parameter, from ``named_modules`` of a wrapped model.

    Returns:
        The name without parts that only wrappers use, wherever they are, and without those that
        wrappers use at the root (``module``, ``m``, PEFT's ``base_model.model``).

    Example:
        >>> clean_name("module._orig_mod.base_model.model.transformer.h.0.attn")
        'transformer.h.0.attn'
    """
    parts = [part for part in name.split(".") if part not in WRAPPERS]
    while parts:
        if parts[0] in LEADING_WRAPPERS:
            parts = parts[1:]
        elif tuple(parts[:2]) == PEFT_WRAPPERS:
            parts = parts[2:]
        else:
            break
    return ".".join(parts)


class ModuleNames:
    """Names of a model's modules, and the number of calls of each in this forward.

    Args:
        model: the model; modules that it makes later are found when they are asked for.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._others: dict[int, nn.Module] = {}
        """Modules asked for that are none of the model's; kept, so that no new one takes their id.
        """
        self._calls: Counter[int] = Counter()
        self._walk()

    def __contains__(self, module: object) -> bool:
        if id(module) in self._names:
            return True
        if not isinstance(module, nn.Module) or id(module) in self._others:
            return False
        self._walk()  # a module that the model has made since
        if id(module) not in self._names:
            self._others[id(module)] = module
        return id(module) in self._names

    def name_of(self, module: nn.Module) -> str | None:
        """Return the name of ``module``, None where it is none of the model's."""
        return self._names[id(module)] if module in self else None

    def matches(self, module: nn.Module, patterns: Sequence[str]) -> bool:
        """Return whether the module's name matches one of the ``fnmatch`` patterns."""
        return any(fnmatchcase(self._names[id(module)], pattern) for pattern in patterns)

    def new_forward(self) -> None:
        """Count calls from 0 again, and forget which modules are none of the model's.

        They may have become the model's since.
        """
        self._calls.clear()
        self._others.clear()

    def next_layer(self, module: nn.Module) -> str:
        """Return the name of this call of ``module`` within one forward.

        The first has the module's own name, then come ``name#1``, ``name#2`` ...
        """
        calls = self._calls[id(module)]
        self._calls[id(module)] += 1
        name = self._names[id(module)]
        return f"{name}#{calls}" if calls else name

    def _walk(self) -> None:
        for name, module in self._model.named_modules():
            self._names.setdefault(id(module), clean_name(name) or type(module).__name__)
