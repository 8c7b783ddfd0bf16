"""Say which attention of a model the adapters have not recorded.

Two views of the same forward are searched for attention: the torch functions that Python calls, which shows no-grad and frozen parts
and custom autograd functions, and the graph that autograd keeps, which shows kernels and C++ code. What an adapter recorded is taken
out; what is left is named. Beside these, scripted modules are read, and modules that run in another thread are noted.

Nothing is changed: functions are called as they are, autograd's nodes are read by name and edge, and no tensor is kept.
"""

from __future__ import annotations

import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from stabmon.capture.autograd_graph import common_module, graph_of
from stabmon.capture.base import nearest_module
from stabmon.capture.names import clean_name
from stabmon.capture.op_graph import Op, find_attention
from stabmon.capture.op_trace import OpTrace, sequence_number
from stabmon.capture.torch_functions import FunctionWatch

if TYPE_CHECKING:
    from stabmon.capture.session import AttentionCapture

FIRST, EVERY = 2, 16
"""The first openings of a capture that are witnessed, and how many times later the next one is: 1, 2, 16, 256 …"""
ELSEWHERE = "ran in another thread, where torch functions are not watched"


def is_due(opening: int) -> bool:
    """Whether the capture's ``opening``, counted from 1, is witnessed."""
    while opening > FIRST and opening % EVERY == 0:
        opening //= EVERY
    return opening == 1 or opening == FIRST


class Witness:
    """Attention of a capture's model that no adapter has recorded.

    Attributes:
        unseen: module name -> what of it is not seen, in words; grows from forward to forward.
        seen: names of the modules of which a call was recorded.
        trace: the torch functions of the forward that is under way; None where it is not witnessed.
    """

    def __init__(self, capture: AttentionCapture) -> None:
        self.unseen: dict[str, str] = {}
        self.seen: set[str] = set()
        self.trace: OpTrace | None = None
        self._capture = capture
        self._due = False
        self._forwards = 0
        self._start = 0
        self._spans: list[tuple[int, int]] = []
        self._inner: set[int] = set()
        self._elsewhere: dict[str, str] = {}

    @contextmanager
    def installed(self, due: bool) -> Iterator[None]:
        """Look at the forwards made in here, where ``due``; what they showed is known when it is left."""
        self._due = due
        if not due:
            yield
            return
        self._start_trace()
        handle = register_module_forward_pre_hook(self._note_thread)
        try:
            yield
        finally:
            handle.remove()
            self.settle()
            self._due = False

    def begin(self) -> None:
        """A forward of the model begins."""
        if self._due and self._is_own_thread():
            self.settle()
            self._forwards += 1
            if is_due(self._forwards):
                self._start_trace()

    def end(self, output: Any) -> None:
        """The forward has come to its end with this result."""
        if self.trace is not None and self._is_own_thread():
            with self._capture.guarded():
                self._find(self.trace, output)
            self.trace = None

    def settle(self) -> None:
        """Search what was noted of a forward whose end was not told."""
        self.end(None)
        self._spans, self._inner, self._elsewhere = [], set(), {}

    def recorded(self, name: str) -> None:
        """An adapter has recorded a call of the module ``name``."""
        self.seen.add(name)
        if self.trace is not None and not torch.is_grad_enabled():
            self._inner.add(sequence_number())

    def covers(self, start: int) -> None:
        """What autograd noted from sequence number ``start`` on belongs to a call that was recorded."""
        if self.trace is not None:
            self._spans.append((start, sequence_number()))

    def describe(self) -> str | None:
        """What is not seen beside what is, in one line; None where everything is seen."""
        if not self.unseen:
            return None
        everything = self.seen | set(self.unseen)
        return (
            f"stabmon sees {len(self.seen - set(self.unseen))} of {len(everything)} attention modules in full; not seen: "
            f"{listed(self.unseen)}: no statistic and no alarm covers these"
        )

    def _start_trace(self) -> None:
        model, names = self._capture.model, self._capture.names
        self.trace = OpTrace((*model.parameters(), *model.buffers()), lambda: nearest_module(names))
        self._start = sequence_number()

    def _is_own_thread(self) -> bool:
        return self._capture.thread in (None, threading.get_ident())

    def _note_thread(self, module: nn.Module, _: Any) -> None:
        if self._is_own_thread() or torch._C._current_graph_task_id() != -1:
            return
        names, model = self._capture.names, self._capture.model
        if module in names or (getattr(module, "_is_replica", False) and type(module) is type(model)):  # nn.DataParallel's
            self._elsewhere[names.name_of(module) or type(model).__name__] = ELSEWHERE

    def _find(self, trace: OpTrace, output: Any) -> None:
        names = self._capture.names
        missed: Counter[tuple[str, str]] = Counter()
        found = list(find_attention(trace.ops))
        for site in found:
            if not site.seen and isinstance(site.op.module, nn.Module) and site.op.module in names:
                missed[names.name_of(site.op.module) or "", _words(site.op)] += 1
        called = [op for op in trace.ops if op.kind in ("softmax", "exponential", "fused")]
        spans = [*self._spans, *(op.span for op in trace.ops if op.seen)]
        told = [site.op.span for site in found]
        parameters = {id(p): clean_name(name) for name, p in self._capture.model.named_parameters()}
        ops, nearest = graph_of(output, parameters, self._start)
        for op in ops:
            number = op.span[0]
            op.seen = any(low <= number < high for low, high in spans) or number + 1 in self._inner
        for site in find_attention(ops):
            number = site.op.span[0]
            if site.seen or any(low <= number < high for low, high in told):
                continue
            caller = next((op for op in called if op.span[0] <= number < op.span[1]), None)
            module = caller.module if caller is not None else None
            if caller is not None and not (isinstance(module, nn.Module) and module in names):
                continue
            name = names.name_of(module) if isinstance(module, nn.Module) else common_module(nearest[site.op])
            if name is not None:
                missed[name or type(self._capture.model).__name__, _words(site.op)] += 1
        for (name, words), count in missed.items():
            times = f"{count} calls of a {words}" if count > 1 else f"a {words}"
            self.unseen.setdefault(name, times if name not in self.seen else f"{times}; other calls of it are seen")
        for name, words in (*self._scripted().items(), *self._elsewhere.items()):
            if not any(known == name or known.startswith(f"{name}.") for known in (*self.seen, *self.unseen)):
                self.unseen[name] = words

    def _scripted(self) -> dict[str, str]:
        """Scripted modules that attend by themselves, which neither Python nor, once optimised, autograd shows."""
        found: dict[str, str] = {}
        for name, module in self._capture.model.named_modules():
            if isinstance(module, torch.jit.ScriptModule) and not any(name.startswith(f"{outer}.") for outer in found):
                kinds = Counter(node.kind() for node in module.inlined_graph.findAllNodes("aten::softmax"))
                products = sum(
                    len(module.inlined_graph.findAllNodes(kind)) for kind in ("aten::matmul", "aten::bmm", "aten::einsum")
                )
                fused = len(module.inlined_graph.findAllNodes("aten::scaled_dot_product_attention"))
                if fused or (kinds and products > 1):
                    found[clean_name(name) or type(module).__name__] = "a softmax inside a scripted module"
        return found


class WitnessedWatch(FunctionWatch):
    """The watch over torch functions, which also notes them for a witness."""

    def __torch_function__(
        self, func: Callable[..., Any], types: object, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        capture, trace = self.capture, self.capture.witness.trace
        if trace is None or not capture.listening():
            return super().__torch_function__(func, types, args, kwargs)
        start, before = sequence_number(), sum(capture.calls.values())
        result = super().__torch_function__(func, types, args, kwargs)
        with capture.guarded():
            seen = sum(capture.calls.values()) > before
            trace.note(func, args, kwargs or {}, result, span=(start, sequence_number()), seen=seen)
        return result


def listed(unseen: Mapping[str, str], most: int = 6) -> str:
    """The modules and what of them is not seen, the first few of them.

    >>> listed({"a": "a softmax of a product", "b": "a kernel flash"}, most=1)
    'a (a softmax of a product) and 1 more'
    """
    some = ", ".join(f"{name} ({words})" for name, words in list(unseen.items())[:most])
    return some + (f" and {len(unseen) - most} more" if len(unseen) > most else "")


def _words(op: Op) -> str:
    name = {"exponential": "hand-written softmax", "softmax": "softmax"}.get(op.kind, op.name)
    return f"{name} of a product" if op.kind != "fused" else f"kernel {name}"
