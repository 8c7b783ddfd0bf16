"""Be told when a model's outermost forward begins and ends, compiled or not, without changing
it.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from types import FrameType
from typing import Any

import torch
from torch import nn

from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.recomputation import is_recomputation

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, Any], None]


class ForwardHooks:
    """Calls ``before(module, args, kwargs)`` and ``after(module, output)`` around each outermost
    call into ``model``.

    Outermost is the model itself, or a child of it where the model's own forward is not used (a
    LightningModule's ``training_step``). Calls that backward makes again (activation checkpoints)
    and calls inside compiled code are not told. What ``before`` and ``after`` raise is theirs to
    handle; they must not raise. A copy of the model, or a model saved whole, takes no watch along.

    Args:
        model: the model that is called.
        outer: compiled wrappers around it, whose calls run outside the compiled graph; hooks go
            there instead.
        before, after: see above; ``after`` is told also where the forward raised, with output None.
            Torch runs no hook after a KeyboardInterrupt: then ``after`` is told when the model is
            next called.
    """

    def __init__(
        self, model: nn.Module, outer: list[nn.Module], before: Before, after: After
    ) -> None:
        self._before, self._after = before, after
        self._stack: list[nn.Module] = []
        self._frame: FrameType | None = None
        """The frame that runs the outermost call; to tell a call inside a call from one that never
        came to its end.
        """
        self._undo: list[Callable[[], None]] = []
        for root in outer or [model]:
            self._watch(root)
            if not _is_compiled(root):
                for child in _called_children(root):
                    self._watch(child)

    def follow(self, outer: list[nn.Module]) -> None:
        """Watch compiled wrappers as well, made after this was. What is inside stays watched:
        taking that out would compile anew.
        """
        for root in outer:
            self._watch(root)

    def remove(self) -> None:
        """Take every hook out again; may be called twice."""
        while self._undo:
            self._undo.pop()()
        self.reset()

    def reset(self) -> None:
        """Forget a forward that never came to its end. Only to be called where none is running."""
        self._stack, self._frame = [], None

    def _watch(self, module: nn.Module) -> None:
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is not None:
            self._wrap_compiled_call(module, compiled)
            return
        first = module.register_forward_pre_hook(_Hook(self._enter), with_kwargs=True, prepend=True)
        last = module.register_forward_hook(_Hook(self._leave), always_call=True)
        self._undo += [first.remove, last.remove]

    def _wrap_compiled_call(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            self._enter(module, args, kwargs)
            output = None
            try:
                output = compiled(*args, **kwargs)
            finally:
                self._leave(module, args, output)
            return output

        def undo() -> None:
            if (
                module.__dict__.get("_compiled_call_impl") is call
            ):  # not if it was compiled anew in the meantime
                module.__dict__["_compiled_call_impl"] = compiled

        module.__dict__["_compiled_call_impl"] = call
        self._undo.append(undo)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or is_recomputation() or _is_redirected(module):
            return
        if is_capturing():  # recorded, and made by replays that call no hook
            return
        if self._stack and module is self._stack[0] and not _is_running(self._frame):
            self.reset()
            self._after(module, None)
        self._stack.append(module)
        if len(self._stack) == 1:
            caller = sys._getframe(1)
            self._frame = caller.f_back if caller.f_code is _Hook.__call__.__code__ else caller
            self._before(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or is_recomputation() or module not in self._stack:
            return
        while self._stack.pop() is not module:
            pass
        if not self._stack:
            self._frame = None
            self._after(module, output)


class _Hook:
    """A hook of ours. Copied or pickled with its module it becomes one of the standard library that
    does nothing.
    """

    def __init__(self, tell: Callable[..., None]) -> None:
        self._tell = tell

    def __call__(self, *args: Any) -> None:
        self._tell(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (nullcontext(), "__exit__")


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    """The nearest modules below that can be called: those in a ``ModuleList`` instead of the
    list.
    """
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_children(child)
        else:
            yield child


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None


def _is_redirected(module: nn.Module) -> bool:
    """Whether this call is Lightning's way of running ``training_step`` under DDP, and no forward
    of the module.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__qualname__", "").startswith(
        "_ForwardRedirection."
    )


def _is_running(frame: FrameType | None) -> bool:
    """Whether ``frame`` is one of the callers of this."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return frame is not None and caller is frame
