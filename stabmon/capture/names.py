"""What the modules of a model are called, whatever wraps the model or lies in between."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from stabmon.model_names import LEADING_WRAPPERS, PEFT_WRAPPERS, WRAPPERS


def clean_name(name: str) -> str:
    """The qualified name of a module as its author wrote it, without what wrappers put in.

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
    """Which modules belong to a model, what each is called, and how often each has attended in this
    forward.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = model
        self._names: dict[int, str] = {}
        self._others: dict[int, nn.Module] = {}
        """Modules that were asked for and are none of the model's; kept, so that no new one takes
        their id.
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
        """What ``module`` is called; None where it is none of the model's."""
        return self._names[id(module)] if module in self else None

    def matches(self, module: nn.Module, patterns: Sequence[str]) -> bool:
        """Whether the module's name matches one of the ``fnmatch`` patterns."""
        return any(fnmatchcase(self._names[id(module)], pattern) for pattern in patterns)

    def new_forward(self) -> None:
        """Count calls from nought again; modules that were none of the model's may have become
        so.
        """
        self._calls.clear()
        self._others.clear()

    def next_layer(self, module: nn.Module) -> str:
        """The name of this call of ``module``: its own name, then ``name#1``, ``name#2`` … within
        one forward.
        """
        calls = self._calls[id(module)]
        self._calls[id(module)] += 1
        name = self._names[id(module)]
        return f"{name}#{calls}" if calls else name

    def _walk(self) -> None:
        for name, module in self._model.named_modules():
            self._names.setdefault(id(module), clean_name(name) or type(module).__name__)
