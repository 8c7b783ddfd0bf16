"""Share what the callbacks of all frameworks have in common."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from stabmon._display.html import card
from stabmon._torch.process_group import on_all_ranks
from stabmon.config import StabilityConfig, load_config
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.records import StabilityIssue, counted
from stabmon.sinks import Sink

logger = logging.getLogger("stabmon")


class StabilityCallbackBase:
    """Configuration, monitor and issues of a callback, over all its training runs.

    Args:
        config: a preset's name, a YAML file's path, or a
            :class:`~stabmon.config.schema.StabilityConfig`.
        log_every: sample every N-th optimizer step.
        sinks: names or sinks, instead of those of the configuration and the framework.
        run_dir: folder of the records, instead of the framework's own.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for an invalid configuration, naming the value and the fix.
    """

    def __init__(
        self,
        config: str | Path | StabilityConfig | None = "observe",
        *,
        log_every: int | None = None,
        sinks: list[str | Sink] | None = None,
        run_dir: str | Path | None = None,
        **overrides: Any,
    ) -> None:
        self.config = load_config(config, log_every=log_every, sinks=sinks, **overrides)
        self.monitor: AttentionStabilityMonitor | None = None
        """The monitor of the present or last training run; None before the first."""
        self._earlier: list[StabilityIssue] = []
        """Issues of the runs before the present one."""
        self._own_sinks = sinks is not None
        self._run_dir = run_dir

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
        if self.monitor is not None:
            self.monitor.close()

    def _start(
        self,
        make: Callable[[], AttentionStabilityMonitor],
        restore: Callable[[AttentionStabilityMonitor], None],
    ) -> None:
        """Start a monitor at the begin of training; to be called on every rank.

        Training goes on without one where that fails.

        Args:
            make: makes the monitor.
            restore: sets it to the state in a checkpoint, on a resume.
        """
        self.close()
        self._earlier, self.monitor = self.issues, None
        try:
            self.monitor = make()
            restore(self.monitor)
            self._earlier = without_restored(self._earlier, self.monitor.issues)
        except Exception:
            logger.exception("stabmon could not start watching; training goes on without it")
            self.close()
            self.monitor = None
        agree_on_ranks(self.monitor)


def agree_on_ranks(monitor: AttentionStabilityMonitor | None) -> None:
    """Let each rank report alone if some rank has no monitor."""
    try:
        agreed = on_all_ranks(monitor is not None)
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
