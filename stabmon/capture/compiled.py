"""Compiled models, inside whose code no hook, patch or mode is seen.

While a capture is open, every entry into compiled code is noticed. The capture steps aside for as
long as that code runs, so that nothing is traced, guarded on or compiled because of it. What is
compiled is dealt with first: a module of the model (or one that holds the model) runs once more,
uncompiled, as a *shadow* whose attention is seen and which leaves no trace; a FlexAttention call is
read from its arguments; anything else can only be counted.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel

from stabmon._torch.isolation import side_effect_free
from stabmon.capture.adapters.flex import PARAMETERS, record_flex
from stabmon.capture.protocol import bind, nearest_module

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture


DYNAMO = "torch._dynamo.eval_frame"


class CompiledCode:
    """Notices entry into compiled code where dynamo sets its frame evaluation."""

    name = "compiled"
    looks_for = "compiled modules that hold the model or lie within it (run once more uncompiled)"

    @contextmanager
    def installed(self, capture: AttentionCapture) -> Iterator[None]:
        """Replaces dynamo's setter for as long as it is entered, where dynamo is loaded and has
        it.
        """
        if DYNAMO not in sys.modules and uses_flex(capture.model):
            importlib.import_module(
                DYNAMO
            )  # eager FlexAttention compiles too, and would load it in mid-forward
        dynamo: Any = sys.modules.get(DYNAMO)
        original = getattr(dynamo, "_maybe_set_eval_frame", None)
        if original is None:
            yield
            return
        thread = threading.get_ident()
        outermost: FrameType | None = None

        def set_eval_frame(callback: Any) -> Any:
            nonlocal outermost
            if threading.get_ident() == thread:
                caller = sys._getframe(1)
                if outermost is None and callback is not None and "fn" in caller.f_locals:
                    outermost = caller
                    look_at(
                        capture,
                        **{name: caller.f_locals.get(name) for name in ("fn", "args", "kwargs")},
                    )
                    capture.pause()
                elif outermost is caller:
                    outermost = None
                    capture.resume()
            return original(callback)

        dynamo._maybe_set_eval_frame = set_eval_frame
        try:
            yield
        finally:
            dynamo._maybe_set_eval_frame = original


def uses_flex(model: nn.Module) -> bool:
    """Whether the source file of one of the model's classes knows FlexAttention."""
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(file), "flex_attention") for file in files)


def look_at(capture: AttentionCapture, fn: Any, args: Any, kwargs: Any) -> None:
    """See to the attention in a call ``fn(*args, **kwargs)`` of compiled code that is about to be
    made; never raises.
    """
    if not capture.is_recording():
        return
    try:
        function = inspect.unwrap(fn) if callable(fn) else fn
        if function is flex_attention or getattr(function, "__qualname__", "").endswith(
            "._flex_attention_hop_wrapper"
        ):
            module = nearest_module(capture.names)
            if module is not None:
                record_flex(capture, module, bind(PARAMETERS, args, kwargs))
            return
        owner = function if isinstance(function, nn.Module) else getattr(function, "__self__", None)
        method = getattr(function, "__name__", "")
        is_forward = isinstance(function, nn.Module) or method in (
            "forward",
            "__call__",
            "_call_impl",
            "_wrapped_call_impl",
        )
        if isinstance(owner, nn.Module) and (
            owner in capture.names or capture.model in owner.modules()
        ):
            if is_forward and torch.is_grad_enabled():
                run_shadow(capture, owner, function, args, kwargs)
                return
        elif isinstance(owner, nn.Module):
            return
        capture.unseen += 1
    except Exception as error:
        capture.failed(error)


def run_shadow(
    capture: AttentionCapture,
    owner: nn.Module,
    function: Callable[..., Any],
    args: Any,
    kwargs: Any,
) -> None:
    """One forward of what is compiled, uncompiled, with the capture watching and no trace left."""
    while isinstance(owner, DistributedDataParallel):  # its forward talks to the other ranks
        owner = function = owner.module
    with side_effect_free(owner):
        function(*args, **kwargs)


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """What is compiled of ``model``: wrappers by ``torch.compile`` that hold it or lie within it,
    and modules that were compiled in place. Looks at every object in the process for wrappers
    around the model, so do not call it each step."""
    wrapper = getattr(sys.modules.get(DYNAMO), "OptimizedModule", ())
    within = [
        m for m in model.modules() if isinstance(m, wrapper) or m._compiled_call_impl is not None
    ]
    around = [
        o
        for o in gc.get_objects()
        if type(o) is wrapper and o is not model and model in o.modules()
    ]
    return [*around, *within]
