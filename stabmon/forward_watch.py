"""Be told when a model's outermost forward begins and ends, compiled or not, without changing it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Before = Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]
After = Callable[[nn.Module, Any], None]


class ForwardWatch:
    """Calls ``before(module, args, kwargs)`` and ``after(module, output)`` around each outermost call into ``model``.

    Outermost is the model itself, or a child of it where the model's own forward is not used (a LightningModule's
    ``training_step``). Calls inside backward (activation checkpoints) and inside compiled code are not told. What ``before`` and
    ``after`` raise is theirs to handle; they must not raise.

    Args:
        model: the model that is called.
        outer: compiled wrappers around it, whose calls run outside the compiled graph; hooks go there instead.
        before, after: see above; ``after`` is told also where the forward raised, with output None.
    """

    def __init__(self, model: nn.Module, outer: list[nn.Module], before: Before, after: After) -> None:
        self._before, self._after = before, after
        self._depth = 0
        self._undo: list[Callable[[], None]] = []
        roots = outer or [model]
        for root in roots:
            self._watch(root)
            if not _is_compiled(root):
                for child in root.children():
                    self._watch(child)

    def remove(self) -> None:
        """Take every hook out again; may be called twice."""
        while self._undo:
            self._undo.pop()()

    def _watch(self, module: nn.Module) -> None:
        compiled = module.__dict__.get("_compiled_call_impl")
        if compiled is not None:
            self._wrap_compiled_call(module, compiled)
            return
        first = module.register_forward_pre_hook(self._enter, with_kwargs=True, prepend=True)
        last = module.register_forward_hook(self._leave, always_call=True)
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

        module.__dict__["_compiled_call_impl"] = call
        self._undo.append(lambda: module.__dict__.update(_compiled_call_impl=compiled))

    def _enter(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        self._depth += 1
        if self._depth == 1:
            self._before(module, args, kwargs)

    def _leave(self, module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        self._depth = max(0, self._depth - 1)
        if self._depth == 0:
            self._after(module, output)


def _is_compiled(module: nn.Module) -> bool:
    return hasattr(module, "_orig_mod") or module.__dict__.get("_compiled_call_impl") is not None
