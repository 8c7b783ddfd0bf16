"""One capture: adapters installed around a model while it is open."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import nn

from stabmon._torch.graph_capture import is_capturing
from stabmon.capture.adapters.compiled import CompiledCode
from stabmon.capture.adapters.torch_functions import FunctionWatch
from stabmon.capture.adapters.transformers import TransformersInterface
from stabmon.capture.callers import attends_itself
from stabmon.capture.coverage.op_trace import sequence_number
from stabmon.capture.coverage.witness import Witness, WitnessedWatch, is_due
from stabmon.capture.function_mode import isolated, push, remove, taken_off
from stabmon.capture.masks.unreachable import hide_unreachable
from stabmon.capture.names import ModuleNames
from stabmon.records import AttentionCall

logger = logging.getLogger("stabmon")

# Private, checked with torch 2.13: id of the backward that runs in this thread, -1 for none. It
# distinguishes a forward that activation checkpoints run again inside a backward from the model's
# own. If it goes, such calls are recorded twice.
_graph_task = torch._C._current_graph_task_id

INTERFACE, COMPILED = TransformersInterface(), CompiledCode()
CONFIRMATIONS = 2
"""Openings in a row in which transformers' interface showed all attention, after which torch
functions are watched no longer.
"""


class AttentionCapture:
    """Show every attention call that an unmodified model makes while this is open.

    A context manager that can be entered any number of times, one after the other. Nothing of the
    model is changed. Only calls that the entering thread makes are seen, and none that a backward
    begun since makes (activation checkpoints run a forward again there).

    Args:
        model: the model as it trains; compiled, wrapped or plain.
        on_call: receives each call as it happens, before the model's own kernel runs, with
            gradients, autocast and all patches and modes off. It must not keep the tensors and must
            not draw from the global random generators.
        modules: ``fnmatch`` patterns of module names whose softmax is attention, whatever it was
            computed from.
        on_error: receives what goes wrong in ``on_call`` or in here; logged once per capture where
            None.
        always_watch_functions: always watch torch functions, also where transformers' attention
            interface has shown everything so far.
        at_once: show a softmax over a product when it is taken, whether or not anything uses it as
            weights.

    Attributes:
        calls: adapter name -> calls seen since it was last entered.
        unseen: calls of compiled code since it was last entered that were not looked into: a
            compiled function that is no module's forward, or a compiled module run without
            gradients. Where ``calls`` stays empty besides, the whole training step is compiled.
        witness: reports attention of the model that was not seen, as far as some openings show it.

    Raises:
        RuntimeError: on entering, where it is open already.

    Example:
        >>> model = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> shapes = []
        >>> with AttentionCapture(model, lambda call: shapes.append(tuple(call.query.shape))):
        ...     _ = model(torch.randn(1, 5, 8))
        >>> shapes
        [(1, 2, 5, 4)]
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
        self._confirmations = 0
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
        self._graph_task = _graph_task()
        try:
            self._install(threading.get_ident())
        except BaseException:
            self._uninstall()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        # may be called again after an error, and then removes what is left
        self._uninstall()
        self.names.new_forward()  # which keeps no module that is not the model's
        if self.calls.keys() == {TransformersInterface.name}:
            self._confirmations += 1
        else:
            self._confirmations = 0

    @contextmanager
    def suspended(self) -> Iterator[None]:
        """Capture nothing inside the context, and go on after it.

        Returns:
            A context manager.

        Example:
            >>> model, calls = nn.MultiheadAttention(8, 2), []
            >>> x = torch.randn(3, 1, 8)
            >>> with AttentionCapture(model, calls.append) as capture, capture.suspended():
            ...     _ = model(x, x, x)
            >>> len(calls)
            0
        """
        thread = self.thread
        self._uninstall()
        try:
            yield
        finally:
            if thread is not None:
                self._install(thread)

    def looked_for(self) -> str:
        """Return the kinds of attention that a capture can show, for error messages.

        Returns:
            One line of text.

        Example:
            >>> "scaled_dot_product_attention" in AttentionCapture(nn.Identity(), print).looked_for()
            True
        """
        return "; ".join(part.looks_for for part in (INTERFACE, FunctionWatch, COMPILED))

    def is_recording(self) -> bool:
        """Return whether a call made right now by this thread is to be recorded.

        Returns:
            True in the model's own forward, outside calls that have been recorded.

        Example:
            >>> with AttentionCapture(nn.Identity(), print) as capture:
            ...     inner = capture.is_recording()
            >>> inner, capture.is_recording()
            (True, False)
        """
        return (
            not self._inside
            and not is_capturing()
            and self.thread == threading.get_ident()
            and _graph_task() == self._graph_task
        )

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Record nothing inside the context: it belongs to a recorded call.

        Returns:
            A context manager.

        Example:
            >>> with AttentionCapture(nn.Identity(), print) as capture, capture.inside():
            ...     capture.is_recording()
            False
        """
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

        Example:
            >>> model, layers = nn.Sequential(nn.Identity()), []
            >>> capture = AttentionCapture(model, lambda call: layers.append(call.layer))
            >>> def describe(layer):
            ...     x = torch.zeros(1, 1, 2, 4)
            ...     return AttentionCall(layer, query=x, key=x, scale=0.5)
            >>> capture.record("own", model[0], describe)
            >>> layers, capture.calls
            (['0'], {'own': 1})
        """
        self.calls[adapter] = self.calls.get(adapter, 0) + 1
        self.witness.recorded(self.names.name_of(module) or "")
        layer = self.names.next_layer(module)
        with self.guarded(), self.inside(), isolated():
            self._on_call(self._with_positions(hide_unreachable(describe(layer)), module))

    def _with_positions(self, call: AttentionCall, module: nn.Module) -> AttentionCall:
        """Set ``is_self`` where it makes a difference: where some key may be hidden."""
        if call.mask is None and call.scores is None:
            return call
        if call.scores is not None:
            queries, keys = call.scores.shape[-2:]
        else:
            assert call.query is not None
            assert call.key is not None
            queries, keys = call.query.shape[2], call.key.shape[2]
        return replace(call, is_self=attends_itself(module, self.names, queries, keys))

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Report errors raised inside the context, and keep them from the model.

        Returns:
            A context manager.

        Example:
            >>> errors = []
            >>> capture = AttentionCapture(nn.Identity(), print, on_error=errors.append)
            >>> with capture.guarded():
            ...     raise ValueError("no shape")
            >>> errors
            [ValueError('no shape')]
        """
        try:
            yield
        except Exception as error:
            self.failed(error)

    def failed(self, error: Exception) -> None:
        """Report an error to ``on_error``, or log the first one; never raises.

        Args:
            error: the error.

        Example:
            >>> errors = []
            >>> AttentionCapture(nn.Identity(), print, on_error=errors.append).failed(OSError("disk"))
            >>> errors
            [OSError('disk')]
        """
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

    def require_functions(self) -> None:
        """Watch torch functions again: they alone show some of the model's attention.

        Example:
            >>> capture = AttentionCapture(nn.Identity(), print)
            >>> capture.require_functions()
            >>> with capture:
            ...     capture.mode is None
            False
        """
        self._confirmations = -1

    def pause(self) -> None:
        """Remove all but the watch over compiled code, which is about to run.

        Example:
            >>> model, calls = nn.MultiheadAttention(8, 2), []
            >>> x = torch.randn(3, 1, 8)
            >>> with AttentionCapture(model, calls.append) as capture:
            ...     capture.pause()
            ...     _ = model(x, x, x)
            ...     capture.resume()
            >>> len(calls)
            0
        """
        self._patches.close()
        self._paused_mode = remove(self.mode)

    def resume(self) -> None:
        """Install again everything that :meth:`pause` removed.

        Example:
            >>> model, calls = nn.MultiheadAttention(8, 2), []
            >>> x = torch.randn(3, 1, 8)
            >>> with AttentionCapture(model, calls.append) as capture:
            ...     capture.pause()
            ...     capture.resume()
            ...     _ = model(x, x, x)
            >>> len(calls)
            1
        """
        self._patch()
        if self.mode is not None and self._paused_mode:
            push(self.mode)

    def _patch(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(INTERFACE.installed(self))
            handle = self.model.register_forward_pre_hook(self._begin, prepend=True)
            stack.callback(handle.remove)
            self._patches = stack.pop_all()

    def _begin(self, *_: object) -> None:
        try:
            self.names.new_forward()
            self.witness.begin()
        except Exception as error:  # a hook in the model's forward, which goes on
            self.failed(error)

    def _install(self, thread: int) -> None:
        due = is_due(self._openings)
        with ExitStack() as stack:
            stack.enter_context(self.witness.installed(due))
            stack.enter_context(COMPILED.installed(self))
            self._patch()
            self._boundary = stack.pop_all()
        if self._always_watch_functions or due or self._confirmations < CONFIRMATIONS:
            self.mode = WitnessedWatch(self, self.witness) if due else FunctionWatch(self)
            push(self.mode)
        self.thread = thread

    def _uninstall(self) -> None:
        self.thread = None
        with self._boundary, self._patches:
            remove(self.mode)
            self.mode = None
