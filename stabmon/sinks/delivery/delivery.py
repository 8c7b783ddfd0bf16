"""Deliver records to one sink: in order, bounded, and again after a failure."""

from __future__ import annotations

import atexit
import logging
import os
import threading
import time
import weakref
from collections.abc import Callable
from typing import Any

from stabmon.sinks.base import Sink
from stabmon.sinks.delivery.calls import Call, WaitingCalls
from stabmon.sinks.delivery.gaps import GapBook, in_words

logger = logging.getLogger("stabmon")

PROMPT = 0.02
"""Seconds within which a sink that keeps up is waited for, and keeps up."""
FIRST_PAUSE, LONGEST_PAUSE = 0.5, 60.0
"""Seconds from a failure to the next try: doubled each time."""
SILENCE = 10.0
"""Seconds without an answer after which a sink is named in the log, or given up at closing."""
LONGEST_CLOSE = 60.0
"""Seconds that closing one sink may take though it goes on writing."""
AT_EXIT = 5.0
"""Seconds that an interpreter's exit waits for records of monitors that were not closed."""
_IDLE = 2.0
"""Seconds without a record after which a thread ends; the next record starts another."""
_TRIES = 8
"""Tries of one record after which the one behind it is tried first."""


class Delivery:
    """One sink, the calls that wait for it, and the thread that makes them.

    A sink with ``in_background`` is called by a daemon thread of its own, others on the thread that
    calls :meth:`put`. A call that raises an ``OSError`` (a full disk, a lost connection) is made
    again after 0.5, 1, 2 … 60 s, for ever; one that raises anything else is lost, and the pauses
    apply from the second such failure on. Records that come meanwhile wait; what the bound of the
    queue drops is a gap, which is given to the sink and logged once it works again.

    A forked process begins with an empty queue and a thread of its own.

    Args:
        sink: the sink.
        prompt: seconds to wait in :meth:`settle` for a sink that keeps up.

    Example:
        >>> written = []
        >>> class Names(Sink):
        ...     def write_intervention(self, record):
        ...         written.append((record["intervention"], threading.current_thread().name))
        >>> delivery = Delivery(Names())
        >>> delivery.put(Call("write_intervention", ({"intervention": "qk_clip"},)))
        >>> delivery.close()
        >>> written
        [('qk_clip', 'stabmon Names')]
    """

    def __init__(self, sink: Sink, prompt: float = PROMPT) -> None:
        self.sink = sink
        self.name = str(getattr(sink, "name", type(sink).__name__))
        self.in_background = bool(getattr(sink, "in_background", True))
        self.last_error = ""
        self.is_troubled = False
        """The sink has failed at least once."""
        self.ended_badly = False
        """The sink had failed, or did not answer, when it was closed."""
        self.gaps = GapBook()
        self._prompt = prompt
        self._failures = self._tries = self._told = 0
        self._reported = self._silence_reported = self._is_abandoned = False
        self._begin()

    def _begin(self) -> None:
        self._pid = os.getpid()
        self._lock = threading.Condition()
        self._waiting = WaitingCalls(self._drop)
        self._thread: threading.Thread | None = None
        self._current: Call | None = None
        self._is_closing = self._is_closed = False
        self._since = 0.0
        """Time at which the call in progress began."""
        self._took = 0.0
        """Seconds of the last call."""
        self._next_try = 0.0
        self._stuck: Call | None = None
        """A record that failed often, and was put behind the next."""
        self._has_passed = False
        """A record behind it was written since."""
        self._answers = 0
        """Calls that came to an end, well or not."""

    def put(self, call: Call) -> None:
        """Make a call, now or in the background; return without waiting for a thread.

        Args:
            call: its records must not change any more where the sink is called in the background,
                see :meth:`~stabmon.sinks.delivery.calls.Call.frozen`.
        """
        if os.getpid() != self._pid:  # thread and lock stayed with the parent, and what waited
            self._begin()
        if not self.in_background:
            with self._lock:
                self._waiting.append(call)
            if time.monotonic() >= self._next_try:
                self._work_through()
            return
        with self._lock:
            self._waiting.append(call)
            self._lock.notify_all()
            silent = self._silent_for()
        self._start()
        if silent > SILENCE and not self._silence_reported:
            self._silence_reported = True
            logger.warning(
                "stabmon: %s has not returned for %.0f s: its records wait, as many as fit, and "
                "training goes on",
                self.name,
                silent,
            )

    def settle(self, deadline: float) -> None:
        """Wait for the calls put, if the sink has kept up so far.

        Args:
            deadline: time of ``time.monotonic`` until which to wait.
        """
        with self._lock:
            if self._failures or self._took > self._prompt or self._silent_for() > self._prompt:
                return
            while self._is_busy() and time.monotonic() < deadline:
                self._lock.wait(deadline - time.monotonic())

    def flush(self, deadline: float) -> bool:
        """Wait for all calls put, unless the sink fails or does not answer.

        Args:
            deadline: time of ``time.monotonic`` until which to wait.

        Returns:
            Whether nothing waits any more.
        """
        if os.getpid() != self._pid:
            return True
        with self._lock:
            while (
                self._is_busy()
                and not self._failures
                and self._silent_for() < SILENCE
                and (left := deadline - time.monotonic()) > 0
            ):
                self._lock.wait(left)
            return not self._is_busy()

    def begin_close(self) -> None:
        """Let the thread make the calls that wait and close the sink; return at once."""
        if not self.in_background or self._is_closed or os.getpid() != self._pid:
            return
        with self._lock:
            self._is_closing = True
            self._lock.notify_all()
        self._start()

    def close(self) -> None:
        """Make the calls that wait, close the sink, and report what is lost; once.

        A sink that gives no answer for 10 s, or takes 60 s, is left to itself: its thread keeps
        neither this process nor what is to come.
        """
        if self._is_closed or os.getpid() != self._pid:
            return
        if not self.in_background:
            self._finish()
        else:
            self.begin_close()
            self._wait_for_end()
        self._is_closed = True
        self.ended_badly = self._failures > 0
        lost = self.gaps.text()
        if lost or self._failures:
            known = self._reported and not self._is_abandoned
            parts = ("" if known else f"{self.last_error}.", lost)
            words = " ".join(filter(None, ("did not write everything.", *parts)))
            logger.warning("stabmon: %s %s", self.name, words)

    def leave_out(self) -> None:
        """Close a sink that cannot be opened, so that it holds no file or run open."""
        self._is_closed = True
        try:
            self.sink.close()
        except Exception as error:
            logger.debug("%s could not be closed either: %s", self.name, _words(error))

    def failed(self, error: BaseException, *, is_final: bool = False) -> None:
        """Note a failure, and log the first.

        Args:
            error: the error.
            is_final: the sink is left out.
        """
        self.is_troubled, self.last_error = True, _words(error)
        if is_final:
            logger.warning(
                "stabmon: %s stopped and is left out: %s. Training and the other sinks go on.",
                self.name,
                self.last_error,
            )
        elif not self._reported and not self._is_closing:
            self._reported = True
            logger.warning(
                "stabmon: %s failed and is tried again: %s. Training goes on.",
                self.name,
                self.last_error,
            )

    def open_later(self, call: Call, error: OSError) -> None:
        """Note that the sink could not be opened now, and open it before its first record."""
        self.failed(error)
        self._failures, self._next_try = 1, time.monotonic() + FIRST_PAUSE
        with self._lock:
            self._waiting.appendleft(call)

    # -- in the thread

    def _start(self) -> None:
        with self._lock:
            if self._thread is not None or self._is_abandoned:
                return
            thread = threading.Thread(target=self._run, name=f"stabmon {self.name}", daemon=True)
            self._thread = thread
        _at_exit(self)
        try:
            thread.start()
        except RuntimeError:  # the interpreter is going down
            self._thread = None
            self._work_through()
            if self._is_closing:
                self._finish()

    def _run(self) -> None:
        while True:
            with self._lock:
                idle_since = time.monotonic()
                while not self._is_closing and not self._is_due():
                    pause = self._next_try - time.monotonic() if self._waiting else _IDLE
                    self._lock.wait(max(pause, 0.0))
                    if not self._waiting and time.monotonic() - idle_since >= _IDLE:
                        break
                if not self._waiting and not self._is_closing:
                    self._thread = None
                    return
            if self._is_closing:
                self._finish()
                return
            self._work_through()

    def _work_through(self) -> None:
        """Make the calls that wait, until one fails that is to be made again."""
        while not self._is_abandoned and (call := self._take()) is not None:
            if not self._make(call) and self._next_try > time.monotonic():
                return

    def _take(self) -> Call | None:
        with self._lock:
            if not self._waiting:
                return None
            self._current, self._since = self._waiting.popleft(), time.monotonic()
            return self._current

    def _make(self, call: Call) -> bool:
        """Make a call that was taken; return whether it went well."""
        error: BaseException | None = None
        try:
            getattr(self.sink, call.method)(*call.arguments)
        except Exception as raised:
            error = raised
        except BaseException as raised:  # as an exit from within somebody's package
            if not self.in_background:
                raise
            error = raised
        finally:
            with self._lock:
                self._current, self._took = None, time.monotonic() - self._since
                self._answers += 1
                if error is not None and not self._is_abandoned:
                    self._note_failure(call, error)
                if not self._waiting or error is not None:
                    self._lock.notify_all()
        if self._is_abandoned:
            return False
        if error is not None:
            self.failed(error)
            return False
        self._has_passed = self._stuck is not None and self._stuck is not call
        self._recovered()
        return True

    def _note_failure(self, call: Call, error: BaseException) -> None:
        """Put the call back where another try may help, and set the time of the next."""
        self.last_error = _words(error)
        is_at_fault = call is self._stuck and self._has_passed
        if call.method == "open" or (isinstance(error, OSError) and not is_at_fault):
            self._waiting.appendleft(call)
            self._tries += 1
        elif call.kind:
            self.gaps.add(call.kind, call.steps, call.count, self.last_error)
        may_be_record = not isinstance(error, OSError) and not self._failures
        pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2 ** min(self._failures, 30))
        self._next_try = 0.0 if may_be_record else time.monotonic() + pause
        self._failures += 1
        if self._tries >= _TRIES:
            self._tries = 0
            self._let_next_pass()

    def _let_next_pass(self) -> None:
        """Put the record that failed often behind the next; it is lost if that one is written."""
        if len(self._waiting) > 1:
            stuck, following = self._waiting.popleft(), self._waiting.popleft()
            if stuck.kind:
                self._stuck, self._has_passed = stuck, False
                stuck, following = following, stuck
            self._waiting.appendleft(following)
            self._waiting.appendleft(stuck)

    def _recovered(self) -> None:
        """After a call that went well, mark the gap before it and say that the sink works again."""
        failures, self._failures, self._tries, self._next_try = self._failures, 0, 0, 0.0
        with self._lock:
            gaps = self.gaps.take()
        if not gaps:
            if failures and self._told == 0:
                self._told = 1
                logger.info("stabmon: %s works again, and nothing is lost", self.name)
            return
        try:
            for gap in gaps:
                self.sink.write_gap(gap)
        except Exception as error:
            with self._lock:
                self.gaps.give_back(gaps)
            self._failures, self._next_try = 1, time.monotonic() + FIRST_PAUSE
            self.failed(error)
            return
        self._told += 1
        if self._told & (self._told - 1) == 0:  # the 1st, 2nd, 4th, 8th … time
            logger.warning(
                "stabmon: %s works again; lost meanwhile: %s (%s)",
                self.name,
                in_words(gaps),
                gaps[-1].reason,
            )

    def _finish(self) -> None:
        """Make the calls that wait once each, up to the first that fails; close the sink."""
        self._is_closing = True
        while not self._is_abandoned and (call := self._take()) is not None:
            if not self._make(call) and self._waiting and self._waiting_again(call):
                break
        with self._lock:
            for call in self._waiting.clear():
                self._drop(call, self.last_error)
        try:
            self.sink.close()
        except Exception as error:
            self.is_troubled, self.last_error = True, _words(error)
            self._failures += 1
        with self._lock:
            self._is_closed, self._thread = True, None
            self._lock.notify_all()

    def _waiting_again(self, call: Call) -> bool:
        return next(iter(self._waiting), None) is call

    def _wait_for_end(self) -> None:
        """Wait for the thread to finish, as long as it makes progress."""
        begun = last = time.monotonic()
        answers = -1
        with self._lock:
            while not self._is_closed:
                now = time.monotonic()
                if answers != self._answers:
                    answers, last = self._answers, now
                left = min(last + SILENCE, begun + LONGEST_CLOSE) - now
                if left <= 0:
                    self._abandon(now - last)
                    return
                self._lock.wait(left)

    def _abandon(self, seconds: float) -> None:
        """Give up on a sink that does not answer; its thread is a daemon and ends with it."""
        self._is_abandoned = self.is_troubled = True
        self._failures += 1
        self.last_error = f"It has not returned for {seconds:.0f} s"
        for call in [*([self._current] if self._current else []), *self._waiting.clear()]:
            self._drop(call, self.last_error)

    # -- with the lock held

    def _is_busy(self) -> bool:
        return self._current is not None or len(self._waiting) > 0

    def _is_due(self) -> bool:
        return len(self._waiting) > 0 and time.monotonic() >= self._next_try

    def _silent_for(self) -> float:
        return 0.0 if self._current is None else time.monotonic() - self._since

    def _drop(self, call: Call, reason: str = "") -> None:
        if call.kind:
            why = reason or self.last_error or "the sink was too slow, and the queue full"
            self.gaps.add(call.kind, call.steps, call.count, why)


_alive: weakref.WeakSet[Delivery] = weakref.WeakSet()
"""Deliveries with a thread, for :func:`_write_at_exit`."""
_registered: list[Callable[[], Any]] = []


def _at_exit(delivery: Delivery) -> None:
    """Let an interpreter's exit wait for a delivery's records."""
    _alive.add(delivery)
    if not _registered:
        _registered.append(atexit.register(_write_at_exit))


def _write_at_exit() -> None:
    """Wait for records of monitors that were never closed, and name what is left behind."""
    deadline = time.monotonic() + AT_EXIT
    for delivery in list(_alive):
        if not delivery._is_closed and not delivery.flush(deadline):
            logger.warning(
                "stabmon: the process ends while %d calls wait for %s (%s); close the monitor to "
                "wait longer",
                len(delivery._waiting) + (delivery._current is not None),
                delivery.name,
                delivery.last_error or "it is slow",
            )


def _words(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"
