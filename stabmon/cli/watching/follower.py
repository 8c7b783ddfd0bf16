"""Look at a run from a thread of its own, so that a slow disk does not hold up the keys."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from stabmon.cli.watching.find_run import find_run, missing
from stabmon.cli.watching.layer_page import History
from stabmon.cli.watching.words import age
from stabmon.sinks.stored.run_tail import RunState, RunTail

_NO_ANSWER_AFTER = 10.0
"""Seconds of one look after which the disk counts as away."""


class Follower:
    """The newest run at or below a path, looked at again and again.

    Args:
        path: the run's folder, or one above runs; it need not exist yet.
        every: seconds between looks.
        on_news: called from the follower's thread when there may be something new.
    """

    def __init__(self, path: Path, every: float, on_news: Callable[[], None] | None = None) -> None:
        self.path, self.every = path, every
        self.on_news = on_news
        self.history: History = ()
        """Signals of the wanted layer over the steps."""
        self._state: RunState | None = None
        self._layer: str | None = None
        self._looked = time.monotonic()
        self._wake, self._ended = threading.Event(), False
        self._thread = threading.Thread(target=self._go, name="stabmon watch", daemon=True)

    def start(self) -> None:
        """Begin to look."""
        self._thread.start()

    def stop(self) -> None:
        """End the thread; one that waits for a disk ends with the process."""
        self._ended = True
        self._wake.set()

    def want(self, layer: str | None) -> None:
        """Read the signals of a layer over the steps, now and at each look; None for no layer."""
        if layer != self._layer:
            self._layer, self.history = layer, ()
            self._wake.set()

    @property
    def state(self) -> RunState | None:
        """The run as last seen; None while there is none."""
        waited = time.monotonic() - self._looked - self.every
        if self._state is not None and waited > _NO_ANSWER_AFTER:
            return replace(self._state, trouble=f"the disk has not answered for {age(waited)}")
        return self._state

    def waiting(self) -> str:
        """Return what is waited for, while there is no run."""
        return f"{missing(self.path.absolute())}. Waiting for it."

    def _go(self) -> None:
        tail: RunTail | None = None
        while not self._ended:
            if tail is None and (folder := _found(self.path)) is not None:
                tail = RunTail(folder)
            if tail is not None:
                self._look(tail)
            self._looked = time.monotonic()
            if (on_news := self.on_news) is not None and not self._ended:
                with contextlib.suppress(RuntimeError):  # the application has just ended
                    on_news()
            self._wake.wait(self.every)
            self._wake.clear()

    def _look(self, tail: RunTail) -> None:
        """Take what is new; what fails is shown, and tried again at the next look."""
        try:
            self._state = tail.look()
            if (layer := self._layer) is not None:
                history = tail.layer_history(layer)
                if layer == self._layer:
                    self.history = history
        except Exception as error:
            trouble = f"{type(error).__name__}: {error}"
            self._state = replace(self._state or RunState(tail.folder), trouble=trouble)


def _found(path: Path) -> Path | None:
    """Return the folder of a run; None where there is none or it cannot be read now."""
    try:
        return find_run(path)
    except OSError:
        return None
