"""Compiled models, inside whose code no hook, patch or mode sees anything.

While a capture is open, every entry into compiled code is noticed. The capture steps aside for as
long as that code runs, so that nothing is traced, guarded on or compiled because of it. The
attention in it is recorded before: a compiled module of the model (or one that holds the model)
runs once more, uncompiled, as a *shadow* that leaves no trace; a FlexAttention call is read from
its arguments; anything else can only be counted.
"""

from __future__ import annotations

import gc
import importlib
import inspect
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.parallel import DistributedDataParallel

from stabmon._torch.isolation import side_effect_free
from stabmon.capture.adapters.flex import PARAMETERS, record_flex
from stabmon.capture.callers import nearest_module
from stabmon.capture.protocol import CaptureSession, bind

# Private, checked with torch 2.13: the module through whose global function `_maybe_set_eval_frame`
# dynamo switches its frame evaluation on before compiled code, in a function with the locals fn,
# args and kwargs, and off after it. Without that function compiled code is not noticed, and
# `unseen` stays 0; with other locals it is noticed and nothing of it is read.
DYNAMO = "torch._dynamo.eval_frame"
FLEX_WRAPPER = "._flex_attention_hop_wrapper"
"""Private, checked with torch 2.13: end of the qualified name of the function that eager
FlexAttention compiles. Under another name its calls are counted as unseen.
"""
FORWARDS = ("forward", "__call__", "_call_impl", "_wrapped_call_impl")
"""Names of the methods by which a module's forward is entered; the last two are ``nn.Module``'s own
(private, checked with torch 2.13).
"""


class CompiledCode:
    """Adapter that notices entry into compiled code where dynamo switches itself on."""

    looks_for = "compiled modules that hold the model or lie within it (run once more uncompiled)"

    @contextmanager
    def installed(self, session: CaptureSession) -> Iterator[None]:
        """Replace dynamo's setter in here, where dynamo is loaded and has it."""
        # eager FlexAttention compiles too, and would load dynamo in the middle of a forward
        if DYNAMO not in sys.modules and uses_flex(session.model):
            importlib.import_module(DYNAMO)
        dynamo: Any = sys.modules.get(DYNAMO)
        original = getattr(dynamo, "_maybe_set_eval_frame", None)
        if original is None:
            yield
            return
        thread = threading.get_ident()
        outermost: FrameType | None = None

        def set_eval_frame(callback: Any) -> Any:
            nonlocal outermost
            try:
                if threading.get_ident() == thread:
                    caller = sys._getframe(1)
                    if outermost is None and callback is not None and "fn" in caller.f_locals:
                        outermost = caller
                        names = ("fn", "args", "kwargs")
                        record_compiled(session, *map(caller.f_locals.get, names))
                        session.pause()
                    elif outermost is caller:
                        outermost = None
                        session.resume()
            except Exception as error:
                session.failed(error)
            return original(callback)

        dynamo._maybe_set_eval_frame = set_eval_frame
        try:
            yield
        finally:
            dynamo._maybe_set_eval_frame = original


def uses_flex(model: nn.Module) -> bool:
    """Return whether a source file of the model's classes imports FlexAttention."""
    files = {type(module).__module__ for module in model.modules()}
    return any(hasattr(sys.modules.get(file), "flex_attention") for file in files)


def record_compiled(session: CaptureSession, fn: Any, args: Any, kwargs: Any) -> None:
    """Record the attention in a call of compiled code about to be made; never raises.

    Args:
        session: the open capture.
        fn: the function that has been compiled.
        args: its positional arguments.
        kwargs: its named arguments.
    """
    if not session.is_recording():
        return
    try:
        function = inspect.unwrap(fn) if callable(fn) else fn
        name = getattr(function, "__qualname__", "")
        if function is flex_attention or name.endswith(FLEX_WRAPPER):
            module = nearest_module(session.names)
            if module is not None:
                record_flex(session, module, bind(PARAMETERS, args, kwargs))
            return
        is_module = isinstance(function, nn.Module)
        owner = function if is_module else getattr(function, "__self__", None)
        if isinstance(owner, nn.Module):
            if owner not in session.names and session.model not in owner.modules():
                return
            is_forward = is_module or getattr(function, "__name__", "") in FORWARDS
            if is_forward and torch.is_grad_enabled():
                # here and not in a function of the module: capture.callers would take it for its
                while isinstance(owner, DistributedDataParallel):  # it talks to the other ranks
                    owner = function = owner.module
                with side_effect_free(owner):
                    function(*args, **kwargs)
                return
        session.unseen += 1
    except Exception as error:
        session.failed(error)


def compiled_modules(model: nn.Module) -> list[nn.Module]:
    """Return the compiled modules that hold ``model`` or lie within it.

    These are wrappers made by ``torch.compile``, and modules that were compiled in place. Every
    object in the process is searched for wrappers around the model, so do not call it each step.

    Args:
        model: the model, itself compiled or not.

    Returns:
        Modules around the model first, then those within it; empty where nothing is compiled.

    Example:
        >>> compiled_modules(nn.Linear(2, 2))
        []
    """
    # Private, checked with torch 2.13: the class of what `torch.compile` returns for a module, and
    # the attribute that `module.compile()` sets. If they go, compiled modules are not found.
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
