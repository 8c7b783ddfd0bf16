"""Tell self-attention from cross-attention by what the attending module's own forward was given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from stabmon.model_names import NOT_HIDDEN_STATES

if TYPE_CHECKING:
    from stabmon.capture.names import ModuleNames

MODULES = 3
"""Modules from the attending one outward that are asked; an inner one may be given only finished
queries and keys.
"""


def attends_itself(module: nn.Module, names: ModuleNames, queries: int, keys: int) -> bool:
    """Whether queries and keys of a call of ``module`` are made of one and the same sequence, the
    last of them aligned.

    False also where it cannot be told. Keys of earlier tokens may stand before.

    Args:
        module: the module that attends, whose forward is running.
        names: the model's modules.
        queries: Q.
        keys: K.
    """
    if keys < queries or (
        keys != queries and isinstance(module, nn.MultiheadAttention)
    ):  # its extra keys stand at the end
        return False
    asked = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and asked < MODULES:
        code = frame.f_code
        owner = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
        if isinstance(owner, nn.Module) and owner in names and (asked or owner is module):
            asked += 1
            sources = {(each.data_ptr(), each.shape): each for each in _sources(frame)}
            if sources:
                return len(sources) == 1 and queries in next(iter(sources.values())).shape[:2]
        frame = frame.f_back
    return False


def _sources(frame: FrameType) -> Iterator[Tensor]:
    """The hidden states among a function's arguments, ``[B, L, C]`` or ``[L, B, C]``."""
    code = frame.f_code
    count = (
        code.co_argcount
        + code.co_kwonlyargcount
        + bool(code.co_flags & 0x04)
        + bool(code.co_flags & 0x08)
    )
    variables = frame.f_locals
    given: dict[str, Any] = {name: variables.get(name) for name in code.co_varnames[1:count]}
    if (
        isinstance(variables, dict) and code.co_flags & 0x01
    ):  # until Python 3.12 a copy, which would keep tensors for the frame's life
        variables.clear()
    for name, value in list(given.items()):
        if isinstance(value, dict):
            given |= value
        elif isinstance(value, tuple):
            given |= {f"{name} {i}": each for i, each in enumerate(value)}
    for name, value in given.items():
        if (
            isinstance(value, Tensor)
            and value.ndim == 3
            and value.is_floating_point()
            and not NOT_HIDDEN_STATES.search(str(name))
        ):
            yield value
