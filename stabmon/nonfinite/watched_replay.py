"""Modules and attention calls of a replayed forward, shown as they run."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

from torch import nn

from stabmon.capture import AttentionCapture, clean_name
from stabmon.records import AttentionCall


@contextmanager
def watched(
    model: nn.Module,
    enter: Callable[[nn.Module, tuple[Any, ...], Mapping[str, Any]], None],
    leave: Callable[[nn.Module, Any], None],
    attend: Callable[[AttentionCall], None],
) -> Iterator[None]:
    """Show every module's inputs and outputs, and every attention call.

    All hooks are removed when it is left.

    Args:
        model: the model to be run inside.
        enter: called with a module, its positional and its keyword arguments before its forward.
        leave: called with a module and its output.
        attend: called with each attention call.
    """
    with ExitStack() as stack:
        for module in model.modules():
            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            stack.callback(before.remove)
            after = module.register_forward_hook(lambda module, _, output: leave(module, output))
            stack.callback(after.remove)
        stack.enter_context(
            AttentionCapture(model, attend, always_watch_functions=True, at_once=True)
        )
        yield


def module_names(model: nn.Module) -> dict[nn.Module, str]:
    """Return the name of every module of a model."""
    return {
        module: clean_name(name) or type(module).__name__ for name, module in model.named_modules()
    }


def is_within(name: str | None, layer: str | None) -> bool:
    """Return True if a module's name is that of a layer or of something in it."""
    return (
        name is not None and layer is not None and (name == layer or name.startswith(layer + "."))
    )
