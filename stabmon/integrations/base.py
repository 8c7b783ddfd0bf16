"""Share what the callbacks of all frameworks have in common."""

from __future__ import annotations

import itertools
import logging
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stabmon._display.html import card
from stabmon._torch.ranks.exchange import announce, decline
from stabmon.config import StabilityConfig, load_config
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.engine.recording.issue_function import OnIssue, checked
from stabmon.records import StabilityIssue, counted
from stabmon.sinks import Sink

logger = logging.getLogger("stabmon")
_trainings = itertools.count()
"""Number of each training of this process, the same on all ranks."""


class StabilityCallbackBase:
    """Configuration, monitor and issues of a callback, over all its training runs.

    Args:
        config: a preset's name, a YAML file's path, or a
            :class:`~stabmon.config.schema.StabilityConfig`.
        log_every: sample every N-th optimizer step of a quiet run, and more while something moves.
        sinks: names or sinks, instead of those of the configuration and the framework.
        run_dir: folder of the records, instead of the framework's own.
        on_issue: a function, called with each issue.
        per_head: True for the values of every head on the dashboards.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for an invalid configuration, naming the value and the fix.
        TypeError: if ``on_issue`` cannot be called.
    """

    def __init__(
        self,
        config: str | Path | StabilityConfig | None = "observe",
        *,
        log_every: int | None = None,
        sinks: list[str | Sink] | None = None,
        run_dir: str | Path | None = None,
        on_issue: OnIssue | None = None,
        per_head: bool | None = None,
        **overrides: Any,
    ) -> None:
        given = {"log_every": log_every, "sinks": sinks, "per_head": per_head}
        self.config = load_config(config, **given, **overrides)
        self.monitor: AttentionStabilityMonitor | None = None
        """The monitor of the present or last training run; None before the first."""
        self._earlier: list[StabilityIssue] = []
        """Issues of the runs before the present one."""
        self._own_sinks = sinks is not None
        self._run_dir, self._on_issue = run_dir, checked(on_issue)
        self._run: Any = None
        """The training that is watched, an object of the framework; None between two."""
        self._copies = 1
        """Times that the framework calls this object at each event."""
        self._calls: Counter[str] = Counter()
        self._said: set[str] = set()

    def __repr__(self) -> str:
        name = f"{type(self).__name__}(log_every={self.config.log_every}"
        if self.monitor is None:
            return f"{name}, no training yet)"
        return f"{name}, {counted(len(self.issues), 'issue')}, {self.monitor!r})"

    def _repr_html_(self) -> str:
        """Return the state of the present or last training run, for notebooks."""
        return card(repr(self)) if self.monitor is None else self.monitor._repr_html_()

    @property
    def issues(self) -> list[StabilityIssue]:
        """Every issue emitted so far, over all runs with this callback."""
        return [*self._earlier, *([] if self.monitor is None else self.monitor.issues)]

    def close(self) -> None:
        """Leave the model as it was found; may be called twice.

        The end of training does this. After an exception outside of a forward, the Hugging Face
        Trainer calls no callback, so that only a person can.
        """
        self._run = None
        if self.monitor is not None:
            self.monitor.close()

    def _takes(self, run: Any, callbacks: Sequence[Any], is_running: Callable[[Any], bool]) -> bool:
        """Return whether to watch a training that begins, and say so where not.

        Args:
            run: the object that stands for the training.
            callbacks: the callbacks of its trainer.
            is_running: returns whether a training that began earlier still goes on.
        """
        if run is self._run:
            self._copies += 1
            self._say("this callback is twice in one trainer: it watches once; give it once")
            return False
        if self._run is not None and is_running(self._run):
            self._say(
                "one callback is shared by two trainers at once: it goes on with the first, and the "
                "second is not watched; give each trainer a callback of its own"
            )
            return False
        others = [each for each in callbacks if isinstance(each, StabilityCallbackBase)]
        if any(each is not self and each._run is run for each in others):
            self._say("a trainer has two callbacks of stabmon: the first alone watches; give one")
            return False
        if self.monitor is not None:
            self._say(
                "this callback has watched a training before: this one is a run of its own in the "
                "records, and .issues has those of both"
            )
        return True

    def _heeds(self, event: str, run: Any) -> bool:
        """Return whether an event is of the training that is watched, and not a repetition."""
        if run is not self._run or self.monitor is None:
            return False
        self._calls[event] += 1
        return self._copies == 1 or self._calls[event] % self._copies == 1

    def _say(self, text: str) -> None:
        if text not in self._said:
            self._said.add(text)
            logger.warning("stabmon: %s", text)

    def _start(
        self,
        run: Any,
        make: Callable[[], AttentionStabilityMonitor],
        restore: Callable[[AttentionStabilityMonitor], None],
    ) -> None:
        """Start a monitor at the begin of training; to be called on every rank.

        Training goes on without one where that fails.

        Args:
            run: the object that stands for the training.
            make: makes the monitor.
            restore: sets it to the state in a checkpoint, on a resume.
        """
        place = f"stabmon/training/{next(_trainings)}"
        self.close()
        self._earlier, self.monitor = self.issues, None
        self._run, self._copies = run, 1
        self._calls.clear()
        try:
            self.monitor = make()
            self.monitor.name_exchange(place)
            restore(self.monitor)
            self.monitor.resume_without_state()  # where there was none
            self._earlier = without_restored(self._earlier, self.monitor.issues)
        except Exception:
            logger.exception("stabmon could not start watching; training goes on without it")
            self.close()
            self.monitor, self._run = None, run
            decline(f"{place}/resume", "none")  # others may wait for this rank's word
        agree_on_ranks(self.monitor, place)


def agree_on_ranks(monitor: AttentionStabilityMonitor | None, place: str) -> None:
    """Let each rank report alone if some rank has no monitor.

    Args:
        monitor: this rank's.
        place: the same on all ranks, and another for each training.
    """
    try:
        agreed = set(announce(f"{place}/start", "no" if monitor is None else "yes")) == {"yes"}
    except Exception:
        logger.exception("stabmon could not reach the other ranks; each reports its own readings")
        agreed = False
    if monitor is not None and not agreed:
        monitor.leave_ranks()


def without_restored(
    earlier: Sequence[StabilityIssue], restored: Sequence[StabilityIssue]
) -> list[StabilityIssue]:
    """Leave out earlier issues that a resumed monitor has from its checkpoint."""
    known = {(issue.step, issue.key, issue.state) for issue in restored}
    return [issue for issue in earlier if (issue.step, issue.key, issue.state) not in known]
