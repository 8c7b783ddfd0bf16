"""Keep the states of a training run that are known to be healthy, for a rollback."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from stabmon._storage.stored_value import Stored
from stabmon._torch.forward_call import is_split
from stabmon._torch.process_group import rank
from stabmon.interventions.run.prepared import Prepared
from stabmon.interventions.run.snapshots import Snapshot, named_tensors, snapshot_bytes
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.rules.evidence.robust_stats import robust_spread

logger = logging.getLogger("stabmon")

NEAR = 8
"""Number of losses whose median is one point of the loss curve."""
NEWEST = 3
"""Number of newest losses whose median is the present loss."""


class HealthyStates(Prepared):
    """The newest state that was healthy when it was taken and for a while after.

    A state is a candidate at first. It counts once ``confirm`` more samples were healthy and the
    loss followed its curve: below that of the state that is kept, and at most its noise above the
    best loss so far. So the state in which training began is kept until the run has proven itself
    better, and a state that was corrupted without an alarm never takes its place. Beside the one
    that is kept a newer candidate waits: two copies at most.

    States in memory end with their process. The state in which a run is resumed takes their place,
    so that there is one to go back to at once. If it was not healthy as the checkpoint was written
    it is the last resort: for weights that are no longer finite, until a healthy one is there.

    Args:
        run: the run.
        every: samples between candidates.
        confirm: healthy samples after which a candidate may count.
        memory_gb: host memory in GB that both copies may take together; above it they go to
            ``run.run_dir``, or are not kept.
    """

    def __init__(
        self, run: TrainingRun, *, every: int = 4, confirm: int = 2, memory_gb: float = 8.0
    ) -> None:
        self.run = run
        self.every, self.confirm, self.memory_gb = every, confirm, memory_gb
        self._healthy: Snapshot | Path | None = None
        self._candidate: Snapshot | Path | None = None
        self._since = self._left_behind = 0
        """Step of the candidate; last step of the course that a rollback left."""
        self._from = 0
        self._age = 0
        self._warned = False
        self._is_calm = True
        """The newest sampled step was healthy."""
        self._keeps_first = False
        """The state at the first forward is to be kept, where the run is resumed."""
        self._is_last_resort = False
        """The kept state is that of a resume, and was not healthy."""

    def begin(self) -> None:
        """Keep the state in which training begins."""
        self._healthy, self._from = self._keep(), self.run.step
        self._keeps_first = True

    def on_first_forward(self) -> None:
        """Keep the state in which a run is resumed: its weights are loaded by now.

        Shards are gathered for a forward, and are kept as they were before.
        """
        if self._keeps_first and self.run.step > 0 and not is_split(self.run.model):
            self._drop(self._healthy)
            self.begin()
        self._keeps_first = False

    @property
    def newest(self) -> Snapshot | None:
        """The newest healthy state, read from disk if need be; None if none yet.

        Of weights that are not finite also that of a resume, healthy or not.
        """
        return self.find(self.is_finite())

    def find(self, finite: bool) -> Snapshot | None:
        """Return :attr:`newest`, given whether the weights of all ranks are finite."""
        if self._is_last_resort and finite:
            return None
        if isinstance(self._healthy, Path):
            try:
                found = Snapshot.load(self._healthy) if self._healthy.is_file() else None
                if found is not None and (why := found.explain_misfit(self.run)):
                    raise ValueError(f"{self._healthy} {why}")
                return found
            except ValueError as error:
                logger.warning("No rollback to it: %s", error)
                self._healthy = None
        return self._healthy

    def offer(self, healthy: bool) -> None:
        """Note a sampled step, and keep its state as a candidate where it is due.

        Args:
            healthy: loss and gradients are finite, and no issue is open that may make it diverge.
        """
        self._is_calm = healthy
        if not healthy:
            self._drop(self._candidate)
            self._candidate = None
            return
        self._age += 1
        if self._candidate is not None and self._age >= self.confirm and self._is_proven():
            self._drop(self._healthy)
            self._healthy, self._candidate, self._from = self._candidate, None, self._since
            self._is_last_resort = False
        has_healthy = self._healthy is not None and not self._is_last_resort
        if self._age >= self.every or (self._candidate is None and not has_healthy):
            self._drop(self._candidate)
            self._candidate, self._since, self._age = self._keep(), self.run.step, 0

    def note_rollback(self) -> None:
        """Note that the run is back in the kept state, and drop the course after it."""
        self._drop(self._candidate)
        self._candidate, self._age, self._left_behind = None, 0, self.run.step

    def explain_refusal(self, snapshot: Snapshot) -> str:
        """Return why a rollback of finite weights would do damage; empty if it may help.

        Args:
            snapshot: the state.
        """
        now, best, noise = self._course()
        if not math.isfinite(now) or not math.isfinite(best):
            return ""
        then = self._loss_at(snapshot.step)
        if now > best + noise:
            if not now < then:
                return ""
            return (
                f"the run stands at loss {now:.3g}, and stood at {then:.3g} after step "
                f"{snapshot.step}: to go back would cost {self.run.step - snapshot.step} steps and "
                "gain nothing"
            )
        return (
            f"the run stands no worse than it ever did (loss {now:.3g}, its best course "
            f"{best:.3g}): the state after step "
            f"{snapshot.step} would only cost {self.run.step - snapshot.step} steps"
        )

    def losses_now_and_at(self, snapshot: Snapshot) -> tuple[float, float]:
        """Return the present loss, and that around the step of a state; NaN if unknown.

        Args:
            snapshot: the state.
        """
        return self._course()[0], self._loss_at(snapshot.step)

    def describe(self, snapshot: Snapshot) -> str:
        """Describe a rollback to a state, and where the run stands.

        Args:
            snapshot: the state.
        """
        now, best, _ = self._course()
        which = (
            "the state in which training began"
            if snapshot.step == 0
            else f"the state after step {snapshot.step}"
        )
        stands = (
            "where the loss is not finite"
            if not math.isfinite(now)
            else f"loss {now:.3g} after a course of {best:.3g}"
        )
        return (
            f"back to {which}, {self.run.step - snapshot.step} steps ago: the run stands at "
            f"{stands}"
        )

    def is_finite(self) -> bool:
        """Return whether this rank's parameters, buffers and masters are finite."""
        return all(
            bool(tensor.isfinite().all())
            for _, tensor in named_tensors(self.run)
            if tensor.is_floating_point()
        )

    def _keeps_course(self) -> bool:
        """Return whether the loss is near its best, as far as it is known."""
        now, best, noise = self._course()
        return len(self._losses()) < 2 or now <= best + noise

    def _is_proven(self) -> bool:
        """Return whether the loss is below that of the kept state and near its best."""
        now, best, noise = self._course()
        losses = self._losses()
        if len(losses) < 2:
            return True  # the loss is not known
        first = losses[losses[:, 0] > self._from, 1][:NEAR]
        lower = self._from > 0 or now < float(np.median(first))
        return lower and now <= best + noise

    def _course(self) -> tuple[float, float, float]:
        """Return the present loss, the best so far and their noise; NaN if unknown.

        Each loss is a median over steps.
        """
        losses = self._losses()[:, 1]
        found = self.run.history.overshoot
        diverged_now = (
            found is not None and found.step == self.run.step and found.how in ("torn", "leap")
        )
        newest = [loss for _, loss in self.run.history.losses[-1 if diverged_now else -NEWEST :]]
        if len(losses) < 2 or not newest:
            return math.nan, math.nan, 0.0
        now = float(np.median(newest)) if all(map(math.isfinite, newest)) else math.nan
        windows = np.lib.stride_tricks.sliding_window_view(losses, min(NEAR, len(losses)))
        noise = float(robust_spread(np.diff(losses)[:, None])[0]) / 2**0.5
        return now, float(np.median(windows, axis=1).min()), noise

    def _loss_at(self, step: int) -> float:
        """Return the median loss around a step; NaN if unknown."""
        losses = self.run.history.recent_losses
        losses = losses[np.isfinite(losses[:, 1])]
        if not len(losses) or losses[0, 0] > step + NEAR:
            return math.nan
        nearest = np.sort(np.argsort(np.abs(losses[:, 0] - step), kind="stable")[:NEAR])
        return float(np.median(losses[nearest, 1]))

    def _losses(self) -> np.ndarray:
        """Return ``[K, 2]`` (step, loss) since the last rollback."""
        known = self.run.history.recent_losses
        return known[known[:, 0] > self._left_behind]

    def close(self) -> None:
        """Drop the states in memory; files stay, for a resume."""
        self._healthy = self._healthy if isinstance(self._healthy, Path) else None
        self._candidate = self._candidate if isinstance(self._candidate, Path) else None

    def keep(self, snapshot: Snapshot, name: str) -> Snapshot | Path:
        """Keep a snapshot in memory, or in a file where it is too large.

        Args:
            snapshot: the snapshot.
            name: start of the file's name.

        Returns:
            The snapshot, or the path of its file.

        Raises:
            MemoryError: where there is neither memory nor a folder.
        """
        if 2 * snapshot_bytes(self.run) <= self.memory_gb * 1e9:
            return snapshot
        if self.run.run_dir is None:
            raise MemoryError(
                f"two copies of the run are more than memory_gb {self.memory_gb:g}: raise it, or "
                "give a run_dir"
            )
        self.run.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run.run_dir / f"{name}-{snapshot.step}-rank{rank()}.pt"
        snapshot.save(path)
        return path

    def state_dict(self) -> dict[str, Any]:
        """Return the name of the healthy state's file, and whether the run is healthy now.

        The name is None for a state in memory.
        """
        name = self._healthy.name if isinstance(self._healthy, Path) else None
        return {"healthy": name, "is_healthy": self._is_calm and self._keeps_course()}

    def parse_state(self, state: Stored) -> Callable[[], None]:
        """Find the file of a healthy state in the run's own folder.

        A file elsewhere, or one that stabmon did not write, is left out.

        Raises:
            ValueError: if it is no state of this.
        """
        healthy = state["healthy"]
        named, run_dir = healthy.maybe(Stored.text), self.run.run_dir
        if named is not None:  # the state is rank 0's, and each rank has a file of its own
            named = re.sub(r"-rank\d+\.pt$", f"-rank{rank()}.pt", named)
        path = None if run_dir is None or named is None else _inside(run_dir, named)
        if named is not None and path is None:
            healthy.leave_out(
                f"{named!r} is no file of a healthy state in the run's own folder {run_dir}, and "
                "is not looked at"
            )

        is_healthy = state.get("is_healthy", False).flag()

        def restore() -> None:
            self._healthy, self._from = path, max(1, self.run.step)
            self._keeps_first = path is None
            self._is_last_resort = path is None and not is_healthy
            if path is None and is_split(self.run.model):
                try:
                    self.begin()
                except Exception as error:  # no file can be written
                    logger.warning("No state is kept to roll back to: %s", error)

        return restore

    def _keep(self) -> Snapshot | Path | None:
        if 2 * snapshot_bytes(self.run) > self.memory_gb * 1e9 and self.run.run_dir is None:
            if not self._warned:
                logger.warning(
                    "No state is kept to roll back to: two copies need more than memory_gb %g, "
                    "and there is no run_dir",
                    self.memory_gb,
                )
            self._warned = True
            return None
        return self.keep(Snapshot.take(self.run), "healthy")

    @staticmethod
    def _drop(kept: Snapshot | Path | None) -> None:
        if isinstance(kept, Path):
            kept.unlink(missing_ok=True)


def _inside(run_dir: Path, named: str) -> Path | None:
    """Return the file of that name in ``run_dir``.

    None where it does not exist, lies or links elsewhere, or was not written by stabmon.
    """
    given = Path(named)
    try:
        # states older than version 1 hold the whole path
        if len(given.parts) > 1 and given.parent.resolve() != run_dir.resolve():
            return None
        path = run_dir / given.name
        ours = re.fullmatch(r"[a-z-]+-\d+-rank\d+\.pt", given.name) is not None
        return path if ours and path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a circle of links
        return None
