"""Report when a model's outermost forward begins and ends, compiled or not."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

import torch
from torch import nn

from stabmon._torch.callbacks.inert_hook import InertHook
from stabmon._torch.graph_capture import is_capturing
from stabmon._torch.ranks.pipeline_schedule import runs_on_no_batch
from stabmon._torch.recomputation import is_recomputation

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, Any], None]


class ForwardHooks:
    """Hooks around each outermost call into a model, which stays unchanged.

    Outermost is the model itself, or a child of it where the model's own forward is not used (a
    LightningModule's ``training_step``). Calls that backward makes again (activation checkpoints)
    and calls inside compiled code are not reported, nor is the run of a pipeline's stage by which it
    only finds the shapes of its tensors. A copy of the model, or a model saved whole,
    takes no hook along.

    Args:
        model: the model that is called.
        outer: compiled wrappers around it, whose calls run outside the compiled graph; hooks go
            there instead.
        before: called as ``before(module, args, kwargs)`` when a call begins; it must not raise.
        after: called as ``after(module, output)`` when the call ends; it must not raise. Where the
            forward raised, ``output`` is None. Torch runs no hook after a KeyboardInterrupt:
            then ``after`` is called when the model is next called.
        on_error: called with what fails in a hook, which the forward must not see.
    """

    def __init__(
        self,
        model: nn.Module,
        outer: list[nn.Module],
        before: Before,
        after: After,
        on_error: Callable[[Exception], None],
    ) -> None:
        self._before, self._after, self._on_error = before, after, on_error
        self._stack: list[nn.Module] = []
        self._frame: FrameType | None = None
        """The frame that runs the outermost call, or None.

        It distinguishes a call inside a call from a call that never came to its end.
        """
        self._undo: list[Callable[[], None]] = []
        for root in outer or [model]:
            self._watch(root)
            if not _is_compiled(root):
                for child in _called_children(root):
                    self._watch(child)

    def add_roots(self, outer: list[nn.Module]) -> None:
        """Add hooks to compiled wrappers made later.

        Hooks inside stay: removing them would make the wrapper compile again.
        """
        for root in outer:
            self._watch(root)

    def close(self) -> None:
        """Remove every hook; may be called twice."""
        while self._undo:
            self._undo.pop()()
        self.reset()

    def reset(self) -> None:
        """Drop a forward that never came to its end; only while none is running."""
        self._stack, self._frame = [], None

    def _watch(self, module: nn.Module) -> None:
        # Module.compile() stores its compiled call in _compiled_call_impl, which Module.__call__
        # prefers (checked with torch 2.13). Under another name, forwards of a model compiled in
        # place would be hooked from inside, and hooks there are traced or break the graph.
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is not None:
            self._wrap_compiled_call(module, compiled)
            return
        first = module.register_forward_pre_hook(
            InertHook(self._enter, self._on_error), with_kwargs=True, prepend=True
        )
        last = module.register_forward_hook(
            InertHook(self._leave, self._on_error), always_call=True
        )
        self._undo += [first.remove, last.remove]

    def _wrap_compiled_call(self, module: nn.Module, compiled: Callable[..., Any]) -> None:
        def call(*args: Any, **kwargs: Any) -> Any:
            try:
                self._enter(module, args, kwargs)
            except Exception as error:
                self._on_error(error)
            output = None
            try:
                output = compiled(*args, **kwargs)
            finally:
                try:
                    self._leave(module, args, output)
                except Exception as error:
                    self._on_error(error)
            return output

        def undo() -> None:
            # unless it was compiled again in the meantime
            if module.__dict__.get("_compiled_call_impl") is call:
                module.__dict__["_compiled_call_impl"] = compiled

        module.__dict__["_compiled_call_impl"] = call
        self._undo.append(undo)

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            self._begin(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if not torch.compiler.is_compiling():
            self._end(module, output)

    def _begin(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if is_recomputation() or _is_redirected(module):
            return
        # a graph that is recorded is made by replays that call no hook
        if is_capturing() or runs_on_no_batch():
            return
        if self._stack and module is self._stack[0] and not _is_running(self._frame):
            self.reset()
            self._after(module, None)
        self._stack.append(module)
        if len(self._stack) == 1:
            caller = sys._getframe(2)  # of _enter
            self._frame = caller.f_back if caller.f_code is InertHook.__call__.__code__ else caller
            self._before(module, args, kwargs)

    def _end(self, module: nn.Module, output: Any) -> None:
        if is_recomputation() or module not in self._stack:
            return
        while self._stack.pop() is not module:
            pass
        if not self._stack:
            self._frame = None
            self._after(module, output)


def _called_children(module: nn.Module) -> Iterator[nn.Module]:
    """Return the nearest modules below that can be called, inside any list."""
    for child in module.children():
        if isinstance(child, nn.ModuleList | nn.ModuleDict):
            yield from _called_children(child)
        else:
            yield child


def _is_compiled(module: nn.Module) -> bool:
    # torch.compile(model) returns a wrapper that holds the model as _orig_mod (torch 2.13); without
    # the name, hooks would also go to the children of a compiled wrapper
    return hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None


def _is_redirected(module: nn.Module) -> bool:
    """Return whether Lightning runs ``training_step`` as this ``forward``.

    Lightning's ``_ForwardRedirection`` replaces ``forward`` for that one call (checked with
    lightning 2.6). Under another name the training step would be taken for the forward.
    """
    forward = module.__dict__.get("forward")
    return forward is not None and getattr(forward, "__qualname__", "").startswith(
        "_ForwardRedirection."
    )


def _is_running(frame: FrameType | None) -> bool:
    """Return whether ``frame`` is among the callers of this function."""
    caller: FrameType | None = sys._getframe(1)
    while caller is not None and caller is not frame:
        caller = caller.f_back
    return frame is not None and caller is frame
