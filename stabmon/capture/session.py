"""One capture: adapters installed in a model's way for as long as it is open, and taken out again
without trace.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from stabmon.capture.adapters.torch_functions import FunctionWatch, push, remove, taken_off
from stabmon.capture.adapters.transformers import TransformersInterface
from stabmon.capture.compiled import CompiledCode
from stabmon.capture.coverage.op_trace import sequence_number
from stabmon.capture.coverage.witness import Witness, WitnessedWatch, is_due
from stabmon.capture.masks.unreachable import hide_unreachable
from stabmon.capture.names import ModuleNames
from stabmon.capture.protocol import isolated
from stabmon.capture.same_positions import attends_itself
from stabmon.records import AttentionCall

logger = logging.getLogger(__name__)


INTERFACE, COMPILED = TransformersInterface(), CompiledCode()
QUIET = 2
"""Openings in a row that transformers' interface explained alone, after which torch functions are
watched no longer.
"""


class AttentionCapture:
    """Shows every attention call that an unmodified model makes while this is open, and changes
    nothing.

    A context manager that can be entered any number of times, one after the other. Only calls that
    the entering thread makes are seen, and none that a backward begun since makes (activation
    checkpoints run a forward again there).

    Args:
        model: the model as it trains; compiled, wrapped or plain.
        on_call: receives each call as it happens, before the model's own kernel runs, with
            gradients, autocast and all patches and modes off. It must not keep the tensors and must
            not draw from the global random generators.
        modules: ``fnmatch`` patterns of module names whose softmax is attention, whatever it was
            computed from.
        on_error: receives what goes wrong in ``on_call`` or in here; logged once a capture where
            None.
        always_watch_functions: always watch torch functions, also where transformers' attention interface has
            shown everything so far.
        at_once: show a softmax over a product when it is taken, whether or not anything uses it as
            weights.

    Attributes:
        calls: adapter name -> calls seen since it was last entered.
        unseen: calls of compiled code since it was last entered that were not looked into: a
            compiled function that is no module's forward, or a compiled module run without
            gradients. Where ``calls`` stays empty besides, the whole training step is compiled.
        witness: tells which attention of the model was seen and which was not, as far as some
            openings show it.
    """

    def __init__(
        self,
        model: nn.Module,
        on_call: Callable[[AttentionCall], None],
        *,
        modules: Sequence[str] = (),
        on_error: Callable[[Exception], None] | None = None,
        always_watch_functions: bool = False,
        at_once: bool = False,
    ) -> None:
        self.model = model
        self.modules = tuple(modules)
        self.calls: dict[str, int] = {}
        self.names = ModuleNames(model)
        self.unseen = 0
        self.mode: FunctionWatch | None = None
        self.witness = Witness(self)
        self._on_call = on_call
        self._on_error = on_error
        self.at_once = at_once
        self._always_watch_functions = always_watch_functions
        self._quiet = 0
        self._boundary = ExitStack()
        self._patches = ExitStack()
        self._paused_mode = False
        self.thread: int | None = None
        self._openings = 0
        self._graph_task = -1
        """The backward inside which this was entered, -1 for none."""
        self._inside = 0
        self._logged = False

    def __enter__(self) -> AttentionCapture:
        if self.thread is not None:
            raise RuntimeError(
                "this AttentionCapture is open already: leave it before entering it again, or "
                "make a second one"
            )
        self.names = ModuleNames(self.model)
        self.calls, self.unseen, self._inside = {}, 0, 0
        self._openings += 1
        self._graph_task = torch._C._current_graph_task_id()
        self._install(threading.get_ident())
        return self

    def __exit__(self, *_: object) -> None:
        self._uninstall()
        self.names.new_forward()  # which keeps no module that is not the model's
        if self.calls.keys() == {TransformersInterface.name}:
            self._quiet += 1
        else:
            self._quiet = 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Everything taken out for a while, then put back."""
        thread = self.thread
        self._uninstall()
        try:
            yield
        finally:
            if thread is not None:
                self._install(thread)

    def looked_for(self) -> str:
        """What was looked for, in one line, for the error that no attention was found."""
        return "; ".join(part.looks_for for part in (INTERFACE, FunctionWatch, COMPILED))

    def is_recording(self) -> bool:
        """Whether a call made right now by this thread is one of the model's own forward, not seen
        further out already.
        """
        return (
            not self._inside
            and self.thread == threading.get_ident()
            and torch._C._current_graph_task_id() == self._graph_task
        )

    @contextmanager
    def inside(self) -> Iterator[None]:
        """While a call that has been recorded runs: what it does inside is not looked at."""
        self._inside += 1
        start = sequence_number()
        try:
            with taken_off(self.mode):
                yield
        finally:
            self._inside -= 1
            self.witness.covers(start)

    def record(
        self, adapter: str, module: nn.Module, describe: Callable[[str], AttentionCall]
    ) -> None:
        """Count one call of ``module`` and show it to ``on_call``; never raises.

        Args:
            adapter: the name under which the call is counted.
            module: the module that attends; one of the model's.
            describe: makes the record from the layer's name; run with gradients, autocast and modes
                off.
        """
        self.calls[adapter] = self.calls.get(adapter, 0) + 1
        self.witness.recorded(self.names.name_of(module) or "")
        layer = self.names.next_layer(module)
        with self.guarded(), self.inside(), isolated():
            self._on_call(self._with_positions(hide_unreachable(describe(layer)), module))

    def _with_positions(self, call: AttentionCall, module: nn.Module) -> AttentionCall:
        """The call with ``is_self`` set, where it makes a difference: where some key may be
        hidden.
        """
        if call.mask is None and call.scores is None:
            return call
        query, key = (
            (call.query, call.key) if call.scores is None else (call.scores, call.scores.mT)
        )
        assert query is not None
        assert key is not None
        return replace(
            call, is_self=attends_itself(module, self.names, query.shape[2], key.shape[2])
        )

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What goes wrong in here is reported and does not reach the model."""
        try:
            yield
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Report what went wrong in here; never raises."""
        if self._on_error is not None:
            try:
                self._on_error(error)
                return
            except Exception:
                logger.exception("the receiver of attention capture's errors failed")
        if not self._logged:
            self._logged = True
            logger.warning(
                "attention capture failed, and goes on without this call: %s", error, exc_info=error
            )

    def declined(self) -> None:
        """Attention has been met that only watching torch functions can show."""
        self._quiet = -1

    def pause(self) -> None:
        """Take out all but the watch over compiled code, which is about to run."""
        self._patches.close()
        self._paused_mode = remove(self.mode)

    def resume(self) -> None:
        """Put back what :meth:`pause` took out."""
        self._patch()
        if self.mode is not None and self._paused_mode:
            push(self.mode)

    def _patch(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(INTERFACE.installed(self))
            handle = self.model.register_forward_pre_hook(lambda *_: self._begins(), prepend=True)
            stack.callback(handle.remove)
            self._patches = stack.pop_all()

    def _begins(self) -> None:
        with self.guarded():
            self.names.new_forward()
            self.witness.begin()

    def _install(self, thread: int) -> None:
        due = is_due(self._openings)
        with ExitStack() as stack:
            stack.enter_context(self.witness.installed(due))
            stack.enter_context(COMPILED.installed(self))
            self._patch()
            self._boundary = stack.pop_all()
        if self._always_watch_functions or due or self._quiet < QUIET:
            self.mode = WitnessedWatch(self) if due else FunctionWatch(self)
            push(self.mode)
        self.thread = thread

    def _uninstall(self) -> None:
        self.thread = None
        remove(self.mode)
        self.mode = None
        self._patches.close()
        self._boundary.close()
