"""Modules whose methods are running, and the sequences that they were given.

Frames are read from the caller outward. A frame belongs to a module where its function's first
argument is one, so no function of capture that lies on this path may take a module first.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

from torch import Tensor, nn

from stabmon.capture.names import ModuleNames
from stabmon.model_names import NOT_HIDDEN_STATES

MODULES = 3
"""Modules from the attending one outward whose arguments are read; an inner one may be given only
finished queries and keys.
"""


def nearest_module(names: ModuleNames) -> nn.Module | None:
    """Return the module whose method called this.

    None where the nearest module is none of the model's (a teacher, a criterion): falling through
    to the root would count a teacher's calls. A bare ``nn.Softmax`` stands for its holder.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None:
        owner = _owner(frame)
        if isinstance(owner, nn.Module) and not isinstance(owner, nn.Softmax):
            return owner if owner in names else None
        frame = frame.f_back
    return None


def attends_itself(module: nn.Module, names: ModuleNames, queries: int, keys: int) -> bool:
    """Return whether queries and keys of a call of ``module`` are of one sequence.

    The last query then belongs to the last key; keys of earlier tokens may stand before. Read from
    what the module's own forward was given. False also where it cannot be told.

    Args:
        module: the module that attends, whose forward is running.
        names: the model's modules.
        queries: Q.
        keys: K.

    Returns:
        True for self-attention, False for cross-attention and where neither is certain.
    """
    # the extra keys of nn.MultiheadAttention stand at the end
    if keys < queries or (keys != queries and isinstance(module, nn.MultiheadAttention)):
        return False
    examined = 0
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and examined < MODULES:
        owner = _owner(frame)
        if isinstance(owner, nn.Module) and owner in names and (examined or owner is module):
            examined += 1
            sources = {(each.data_ptr(), each.shape): each for each in _hidden_states(frame)}
            if sources:
                return len(sources) == 1 and queries in next(iter(sources.values())).shape[:2]
        frame = frame.f_back
    return False


def _owner(frame: FrameType) -> Any:
    """Return the first argument of a frame's function."""
    code = frame.f_code
    return frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None


def _hidden_states(frame: FrameType) -> Iterator[Tensor]:
    """Yield the hidden states ``[B, L, C]`` or ``[L, B, C]`` among a call's arguments."""
    code = frame.f_code
    count = (
        code.co_argcount
        + code.co_kwonlyargcount
        + bool(code.co_flags & inspect.CO_VARARGS)
        + bool(code.co_flags & inspect.CO_VARKEYWORDS)
    )
    variables = frame.f_locals
    given: dict[str, Any] = {name: variables.get(name) for name in code.co_varnames[1:count]}
    # until Python 3.12 f_locals is a copy, which would keep tensors for the frame's life
    if isinstance(variables, dict) and code.co_flags & inspect.CO_OPTIMIZED:
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
