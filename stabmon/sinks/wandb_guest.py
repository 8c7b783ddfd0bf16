"""Rows in a W&B run that is not ours, never committed while it goes on."""

from __future__ import annotations

import logging
import os
from collections import deque
from collections.abc import Callable, Mapping
from typing import Any

logger = logging.getLogger("stabmon")

_KEPT = 10_000
"""Readings kept until the run ends."""


class GuestRows:
    """Put values on the rows of somebody else's W&B run without moving its step on.

    W&B drops a row logged with a ``step`` below its own counter, and each committed row moves the
    counter on. So values are logged with ``commit=False`` and no step: they wait in the row being
    filled until its owner commits it, under whatever step. A row holds one reading, so that a newer
    reading replaces one still waiting, which is kept. When the run ends, and nothing of its owner's
    can come after it, those kept are added as rows; where the run is made to be resumed, whose
    steps go on from the last row, they become the table ``stability/readings`` in its summary
    instead.

    Args:
        run: the ``wandb.Run``.
        table: makes a W&B table of columns and rows.
    """

    def __init__(self, run: Any, table: Callable[[list[str], list[list[Any]]], Any]) -> None:
        self._run, self._table = run, table
        self._placed: dict[str, float] | None = None
        self._at = -1
        self._replaced: deque[dict[str, float]] = deque(maxlen=_KEPT)
        self._last_calls: list[Callable[[], None]] = []

    @classmethod
    def of(cls, run: Any, table: Callable[[list[str], list[list[Any]]], Any]) -> GuestRows:
        """Return the one object of a run, so that two monitors share it.

        Otherwise each would replace the other's waiting readings unseen.

        Args:
            run: the ``wandb.Run``.
            table: makes a W&B table of columns and rows.
        """
        # Run._teardown_hooks: W&B has no public notice of a run's end. Checked with wandb 0.31:
        # `finish`, also at exit, calls the early hooks while the run can still be logged to.
        # Without them, readings that were replaced are in the records alone.
        hooks = getattr(run, "_teardown_hooks", None)
        for hook in hooks or ():
            owner = getattr(hook.call, "__self__", None)
            if isinstance(owner, cls):
                return owner
        rows = cls(run, table)
        if isinstance(hooks, list):
            from wandb.sdk.wandb_run import TeardownHook, TeardownStage

            hooks.append(TeardownHook(rows.end, TeardownStage.EARLY))
        return rows

    def put(self, scalars: Mapping[str, float], media: Mapping[str, Any]) -> None:
        """Put a reading on the row that is being filled.

        Args:
            scalars: numbers, kept if a newer reading replaces them.
            media: histograms and images, not kept.
        """
        self._settle()
        if self._placed is not None:
            self._replaced.append(self._placed)
        # else numbers that only the older reading has would stay in the row
        stale = dict.fromkeys(set(self._placed or ()) - set(scalars), float("nan"))
        self._run.log({**stale, **scalars, **media}, commit=False)
        self._placed, self._at = dict(scalars), self._run.step

    def add(self, step: str, scalars: Mapping[str, float], media: Mapping[str, Any]) -> None:
        """Add to the reading that waits on the row being filled, if it is of the same step.

        Else put them there like a reading.

        Args:
            step: name of the step among ``scalars``.
            scalars: numbers, kept like those of a reading.
            media: images, not kept.
        """
        self._settle()
        placed = self._placed
        if placed is None or placed.get(step) != scalars[step]:
            self.put(scalars, media)
        else:
            self._run.log({**scalars, **media}, commit=False)
            self._placed = {**placed, **scalars}

    def join(self, last_call: Callable[[], None]) -> None:
        """Add a function to call as the run ends."""
        self._last_calls.append(last_call)

    def leave(self, last_call: Callable[[], None]) -> None:
        """Remove a function that :meth:`join` added."""
        self._last_calls.remove(last_call)

    def end(self) -> None:
        """Add the readings that are on no row; W&B calls it as the run ends."""
        try:
            for last_call in self._last_calls:
                last_call()
            self._settle()
            rows, self._replaced = list(self._replaced), deque()
            if not rows:
                return
            if self._is_resumed():
                names = list(dict.fromkeys(name for row in rows for name in row))
                self._run.summary["stability/readings"] = self._table(
                    names, [[row.get(name) for name in names] for row in rows]
                )
                return
            if self._placed is not None:
                self._run.log({}, commit=True)  # the row in which it waits
            for row in rows:
                self._run.log(row, commit=True)
        except Exception as error:
            logger.warning(
                "stabmon's last readings did not reach W&B (%s: %s); its records have them",
                type(error).__name__,
                error,
            )

    def _settle(self) -> None:
        """Drop the waiting reading once W&B's step has moved on: its row is committed."""
        if self._placed is not None and self._run.step != self._at:
            self._placed = None

    def _is_resumed(self) -> bool:
        """Return whether the run was or can be resumed.

        It can where ``resume`` is allowed, unless W&B made up the id (Lightning always allows).
        """
        resume = getattr(self._run.settings, "resume", None)
        if getattr(self._run, "resumed", False) or resume in ("must", "auto", True):
            return True
        # Run._telemetry_obj: the only place that says whether `wandb.init` was given an id. Checked
        # with wandb 0.31. Without it the id counts as given, and readings go into the summary.
        feature = getattr(getattr(self._run, "_telemetry_obj", None), "feature", None)
        named = getattr(feature, "set_init_id", True) or bool(os.environ.get("WANDB_RUN_ID"))
        return resume == "allow" and named
