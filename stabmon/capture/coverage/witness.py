"""Attention of a model that the adapters have not recorded.

Two views of the same forward are searched for attention: the torch functions that Python calls,
which shows no-grad and frozen parts and custom autograd functions, and the graph that autograd
keeps, which shows kernels and C++ code. What an adapter recorded is taken out; what is left is
named. Beside these, scripted modules are read, and modules that run in another thread are noted.

Nothing is changed: functions are called as they are, autograd's nodes are read by name and edge,
and no tensor is kept.
"""

from __future__ import annotations

import threading
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from stabmon.capture.adapters.torch_functions import FunctionWatch
from stabmon.capture.callers import nearest_module
from stabmon.capture.coverage.autograd_graph import common_module, graph_of, is_from_another_thread
from stabmon.capture.coverage.op_graph import Op, find_attention
from stabmon.capture.coverage.op_trace import OpTrace, sequence_number
from stabmon.capture.model_call import ModelCall
from stabmon.capture.names import clean_name
from stabmon.capture.protocol import CaptureSession

SOUGHT = ("softmax", "exponential", "fused")
SCRIPTED = ("softmax", "scaled_dot_product_attention")
SCRIPTED_PRODUCTS = ("matmul", "bmm", "einsum", "baddbmm")
FIRST, EVERY = 2, 16
"""Openings of a capture that are witnessed: the first two, and those 16 times later, again and
again: 1, 2, 16, 32, 256, 512 ...
"""
ELSEWHERE = "ran in another thread, where torch functions are not watched"


def is_due(opening: int) -> bool:
    """Return whether the capture's ``opening``, counted from 1, is witnessed."""
    while opening > FIRST and opening % EVERY == 0:
        opening //= EVERY
    return opening == 1 or opening == FIRST


class Witness:
    """Search for attention of a capture's model that no adapter has recorded.

    Args:
        session: the capture.

    Attributes:
        unseen: module name -> its attention that is not seen, in words; grows from forward to
            forward.
        seen: names of the modules of which a call was recorded.
        trace: the torch functions of the forward that is under way; None where it is not witnessed.
    """

    def __init__(self, session: CaptureSession) -> None:
        self.unseen: dict[str, str] = {}
        self.seen: set[str] = set()
        self.trace: OpTrace | None = None
        self._session: CaptureSession = weakref.proxy(session)  # which holds this
        self._due = self._waits = False
        self._forwards = 0
        self._start = 0
        self._spans: list[tuple[int, int]] = []
        self._inner: set[int] = set()
        self._elsewhere: dict[str, str] = {}

    @contextmanager
    def installed(self, due: bool) -> Iterator[None]:
        """Witness the forwards made in here where ``due``, with the result on leaving."""
        self._due = self._waits = due
        if not due:
            yield
            return
        self._start_trace()
        try:
            yield
        finally:
            self.settle()
            self._due = False

    def begin(self) -> None:
        """Note that a forward of the model begins."""
        if self._due and not self._is_own_thread():
            self._elsewhere[type(self._session.model).__name__] = ELSEWHERE
        elif self._due:
            if self._waits:  # the operations noted so far are of no forward
                self.trace, self._waits = None, False
            self.settle()
            self._forwards += 1
            if is_due(self._forwards):
                self._start_trace()

    def end(self, output: Any) -> None:
        """Search the forward that ends with this result."""
        if self.trace is not None and self._is_own_thread():
            with self._session.guarded():
                self._find(self.trace, output)
            self.trace = None

    def settle(self) -> None:
        """Search the operations noted of a forward whose end was not announced."""
        self.end(None)
        self._spans, self._inner, self._elsewhere = [], set(), {}

    def recorded(self, name: str) -> None:
        """Note that an adapter has recorded a call of the module ``name``."""
        self.seen.add(name)
        if self.trace is not None and not torch.is_grad_enabled():
            self._inner.add(sequence_number())

    def covers(self, start: int) -> None:
        """Note that autograd's nodes from number ``start`` on belong to a recorded call."""
        if self.trace is not None:
            self._spans.append((start, sequence_number()))

    def describe(self) -> str | None:
        """Return in one line which attention is not seen, None where everything is seen."""
        if not self.unseen:
            return None
        everything = self.seen | set(self.unseen)
        return (
            f"stabmon sees {len(self.seen - set(self.unseen))} of {len(everything)} attention "
            f"modules in full; not seen: {listed(self.unseen)}: no statistic and no alarm covers "
            "these"
        )

    def _start_trace(self) -> None:
        model, names = self._session.model, self._session.names
        self.trace = OpTrace((*model.parameters(), *model.buffers()), lambda: nearest_module(names))
        self._start = sequence_number()

    def _is_own_thread(self) -> bool:
        return self._session.thread in (None, threading.get_ident())

    def _find(self, trace: OpTrace, output: Any) -> None:
        missed = self._missed_calls(trace) + self._missed_nodes(trace, output)
        for (name, words), count in missed.items():
            times = f"{count} calls of a {words}" if count > 1 else f"a {words}"
            self.unseen.setdefault(
                name, times if name not in self.seen else f"{times}; other calls of it are seen"
            )
        for name, words in (
            *scripted_attention(self._session.model).items(),
            *self._elsewhere.items(),
        ):
            inside = any(f"{known}.".startswith(f"{name}.") for known in (*self.seen, *self.unseen))
            if not inside and not any(name.startswith(f"{outer}.") for outer in self.unseen):
                self.unseen[name] = words

    def _missed_calls(self, trace: OpTrace) -> Counter[tuple[str, str]]:
        """Count attention that Python called and no adapter recorded, by module and words."""
        names = self._session.names
        sites = [site for site in find_attention(trace.ops) if not site.seen]
        owners = [
            names.name_of(site.op.module) if isinstance(site.op.module, nn.Module) else None
            for site in sites
        ]
        return Counter(
            (owner, site.op.words)
            for owner, site in zip(owners, sites, strict=True)
            if owner is not None
        )

    def _missed_nodes(self, trace: OpTrace, output: Any) -> Counter[tuple[str, str]]:
        """Count attention that autograd kept and Python did not call, by module and words.

        It ran in C++ code, custom functions or other threads.
        """
        model = self._session.model
        ops, above = graph_of(
            output, {id(p): clean_name(name) for name, p in model.named_parameters()}
        )
        recorded, called = (
            _numbers(trace.ops, lambda op: op.seen),
            _numbers(trace.ops, lambda op: op.kind in SOUGHT),
        )
        recorded.update(number for start, end in self._spans for number in range(start, end))
        for op in ops:
            op.seen = op.span[0] in recorded or op.span[1] in self._inner
        # each thread numbers its nodes by itself: numbers cannot be compared then
        threads = any(is_from_another_thread(op) for op in ops)
        missed: Counter[tuple[str, str]] = Counter()
        for site in find_attention(ops):
            name = common_module(above[site.op])
            old = site.op.span[0] < self._start
            known = site.seen or site.op.span[0] in called
            if name is not None and not (self._is_seen(name) if threads or old else known):
                missed[name or type(model).__name__, site.op.words] += 1
        return missed

    def _is_seen(self, name: str) -> bool:
        """Return whether attention was recorded in a module, inside it, or around it."""
        return any(
            known == name or known.startswith(f"{name}.") or name.startswith(f"{known}.")
            for known in self.seen
        )


class WitnessedWatch(FunctionWatch):
    """Function watch that also notes the functions for a witness."""

    def __init__(self, session: CaptureSession, witness: Witness) -> None:
        super().__init__(session)
        self.witness = witness

    def watch(
        self,
        call: ModelCall,
        function: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: Mapping[str, Any],
    ) -> Any:
        session, trace = self.session, self.witness.trace
        if trace is None or not session.is_recording():
            return super().watch(call, function, args, kwargs)
        start, before = sequence_number(), sum(session.calls.values())
        result = super().watch(call, function, args, kwargs)
        with session.guarded():
            seen = sum(session.calls.values()) > before
            trace.note(function, args, kwargs, result, span=(start, sequence_number()), seen=seen)
        return result


def listed(unseen: Mapping[str, str], most: int = 6) -> str:
    """Return the modules and their attention that is not seen, the first few of them.

    Args:
        unseen: module name -> its attention that is not seen, in words.
        most: how many modules are named.

    Example:
        >>> listed({"a": "a softmax of a product", "b": "a kernel flash"}, most=1)
        'a (a softmax of a product) and 1 more'
    """
    some = ", ".join(f"{name} ({words})" for name, words in list(unseen.items())[:most])
    return some + (f" and {len(unseen) - most} more" if len(unseen) > most else "")


def scripted_attention(model: nn.Module) -> dict[str, str]:
    """Return the scripted modules that attend by themselves, with a description each.

    Neither Python nor, once they are optimised, autograd shows their attention.
    """
    found: dict[str, str] = {}
    for name, module in model.named_modules():
        if not isinstance(module, torch.jit.ScriptModule) or any(
            name.startswith(f"{outer}.") for outer in found
        ):
            continue
        # Undocumented, checked with torch 2.13: the graph with all calls inlined, which owns its
        # nodes, and their search by kind. Without them scripted attention raises an error in here.
        graph: Any = module.inlined_graph
        count = {
            kind: len(graph.findAllNodes(f"aten::{kind}"))
            for kind in (*SCRIPTED, *SCRIPTED_PRODUCTS)
        }
        products = sum(count[kind] for kind in SCRIPTED_PRODUCTS)
        if count["scaled_dot_product_attention"] or (count["softmax"] and products > 1):
            found[clean_name(name) or type(module).__name__] = "attention inside a scripted module"
    return found


def _numbers(ops: Iterable[Op], which: Callable[[Op], bool]) -> set[int]:
    """Return the sequence numbers of the autograd nodes that some operations made."""
    return {number for op in ops if which(op) for number in range(*op.span)}
