"""Copies of a training run's state, on the host or on disk, and which of them are known to be healthy."""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from stabmon.atomic import replace_whole
from stabmon.gradients import local
from stabmon.optimizer_view import state_of
from stabmon.rules.spread import robust_spread
from stabmon.stored import Stored

if TYPE_CHECKING:
    from stabmon.interventions.run import TrainingRun

logger = logging.getLogger("stabmon")

NEAR = 8
"""Losses whose median is a point of the course."""
NEWEST = 3
"""Losses whose median tells where the run stands."""


SNAPSHOT_VERSION = 1
"""Of a snapshot's file; one without is of before there were any, and the same."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """Parameters, buffers, optimizer state, scheduler and gradient scaler after one optimizer step; of this rank's shards."""

    step: int
    tensors: Mapping[str, Tensor]
    optimizer: list[dict[str, Any]]
    """The state of each parameter, in the order of the groups of all optimizers."""
    groups: list[dict[str, Any]]
    """Each group's settings, without its parameters."""
    scheduler: list[dict[str, Any]]
    """The state of each scheduler."""
    scaler: dict[str, Any] | None

    @classmethod
    @torch.no_grad()
    def take(cls, run: TrainingRun) -> Snapshot:
        """Copy the state to the host."""
        return cls(
            step=run.step,
            tensors={name: _copied(tensor) for name, tensor in _named(run)},
            optimizer=[{k: _copied(v) for k, v in state.get(p, {}).items()} for p, state in _stepped(run)],
            groups=[{k: _copied(v) for k, v in group.settings.items() if k != "params"} for group in run.groups],
            scheduler=[_copied(each.state_dict()) for each in run.schedulers],
            scaler=_copied(run.grad_scaler.state_dict()) if run.grad_scaler is not None else None,
        )

    @torch.no_grad()
    def restore(self, run: TrainingRun, *, schedule: bool) -> None:
        """Put the state back in place, bit for bit, leaving every random generator alone.

        Args:
            run: the run that it was taken of.
            schedule: also the scheduler, and the groups' rates and other settings; without, they stay where they are now.
        """
        for name, tensor in _named(run):
            if name in self.tensors:
                local(tensor.detach()).copy_(self.tensors[name])
        for (parameter, state), saved in zip(_stepped(run), self.optimizer, strict=True):
            _restore_entries(state[parameter] if saved or parameter in state else {}, saved, local(parameter).device)
            if not saved:
                state.pop(parameter, None)
        if schedule:
            for group, settings in zip(run.groups, self.groups, strict=True):
                group.settings.update({name: _copied(value) for name, value in settings.items()})
            for scheduler, saved in zip(run.schedulers, self.scheduler, strict=True):
                scheduler.load_state_dict(_copied(saved))
        if self.scaler:
            run.grad_scaler.load_state_dict(_copied(self.scaler))

    def save(self, path: Path) -> None:
        """Write it to a file, that is there as a whole or not at all."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        replace_whole(path, lambda fresh: torch.save({"version": SNAPSHOT_VERSION, **values}, fresh))

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read what :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged or of a later version.
        """
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            version = values.pop("version", SNAPSHOT_VERSION)
            if not isinstance(values["scheduler"], list):  # written when a run had one at most
                values["scheduler"] = [] if values["scheduler"] is None else [values["scheduler"]]
            if version == SNAPSHOT_VERSION:
                return cls(**values)
        except Exception as error:  # what torch raises for a damaged file is of many kinds
            words = str(error).partition("\n")[0]
            raise ValueError(f"{path} holds no state to go back to ({type(error).__name__}: {words})") from error
        raise ValueError(f"{path} is of version {version}, but this stabmon reads {SNAPSHOT_VERSION}: update stabmon")


def snapshot_bytes(run: TrainingRun) -> int:
    """How large a snapshot would be now."""
    state = [value for p, state in _stepped(run) for value in state.get(p, {}).values() if isinstance(value, Tensor)]
    return sum(local(t).numel() * t.element_size() for t in [*(tensor for _, tensor in _named(run)), *state])


class HealthyStates:
    """Keeps the newest state that was healthy before it was taken and for a while after, and has a loss to show for it.

    A state is a candidate at first. It counts once ``confirm`` more samples were healthy and the loss has kept to its course: below that of
    the state that is kept, and no higher than the best course so far, by more than its noise. So the state in which training began is kept
    until the run has proven itself better, and a state that was ruined without an alarm never takes its place. Beside the one that is kept
    a newer candidate waits: two copies at most.

    Args:
        run: the run.
        every: samples between candidates.
        confirm: healthy samples after which a candidate may count.
        memory_gb: host memory that both copies may take together; above it they go to ``run.run_dir``, or nowhere.
    """

    def __init__(self, run: TrainingRun, *, every: int = 4, confirm: int = 2, memory_gb: float = 8.0) -> None:
        self.run = run
        self.every, self.confirm, self.memory_gb = every, confirm, memory_gb
        self._healthy: Snapshot | Path | None = None
        self._candidate: Snapshot | Path | None = None
        self._since = self._left_behind = 0
        """Step of the candidate; step from which on losses are those of what was gone back from."""
        self._from = 0
        self._age = 0
        self._said = False

    def begin(self) -> None:
        """Keep the state in which training begins, to begin again from."""
        self._healthy, self._from = self._keep(), self.run.step

    @property
    def newest(self) -> Snapshot | None:
        """The newest healthy state, read from disk if it is there; None where there is none yet."""
        if isinstance(self._healthy, Path):
            try:
                return Snapshot.load(self._healthy) if self._healthy.is_file() else None
            except ValueError as error:
                logger.warning("No rollback to it: %s", error)
                self._healthy = None
        return self._healthy

    def offer(self, healthy: bool) -> None:
        """Say after each sampled step whether the run is healthy: loss and gradients finite, and nothing under way that may ruin it."""
        if not healthy:
            self._drop(self._candidate)
            self._candidate = None
            return
        self._age += 1
        if self._candidate is not None and self._age >= self.confirm and self._is_proven():
            self._drop(self._healthy)
            self._healthy, self._candidate, self._from = self._candidate, None, self._since
        if self._age >= self.every or (self._candidate is None and self._healthy is None):
            self._drop(self._candidate)
            self._candidate, self._since, self._age = self._keep(), self.run.step, 0

    def gone_back(self) -> None:
        """The run is in the state that is kept: what came after it is no longer its course."""
        self._drop(self._candidate)
        self._candidate, self._age, self._left_behind = None, 0, self.run.step

    def why_not(self, snapshot: Snapshot) -> str:
        """Why the run would be worse off in a state than where it stands; empty where it would not, or nobody can say."""
        now, best, noise = self._course()
        if not math.isfinite(now) or not math.isfinite(best) or now > best + noise:
            return ""
        if any(not bool(tensor.isfinite().all()) for _, tensor in _named(self.run) if tensor.is_floating_point()):
            return ""
        return (
            f"the run stands no worse than it ever did (loss {now:.3g}, its best course {best:.3g}): the state after step "
            f"{snapshot.step} would only cost {self.run.step - snapshot.step} steps"
        )

    def describe(self, snapshot: Snapshot) -> str:
        """What the run is put back to and why, in words."""
        now, best, _ = self._course()
        which = "the state in which training began" if snapshot.step == 0 else f"the state after step {snapshot.step}"
        stands = "where the loss is not finite" if not math.isfinite(now) else f"loss {now:.3g} after a course of {best:.3g}"
        return f"back to {which}, {self.run.step - snapshot.step} steps ago: the run stands at {stands}"

    def _is_proven(self) -> bool:
        """Whether the loss since the candidate is below that at the state that is kept, and has kept to its best course."""
        now, best, noise = self._course()
        losses = self._losses()
        if len(losses) < 2:
            return True  # nobody tells us the loss
        first = losses[losses[:, 0] > self._from, 1][:NEAR]
        lower = self._from > 0 or now < float(np.median(first))
        return lower and now <= best + noise

    def _course(self) -> tuple[float, float, float]:
        """(median of the newest losses, lowest such median so far, their noise); NaN where no loss is known."""
        losses = self._losses()[:, 1]
        found = self.run.history.overshoot
        torn_now = found is not None and found.step == self.run.step and found.how in ("torn", "leap")
        newest = [loss for _, loss in self.run.history.losses[-1 if torn_now else -NEWEST :]]
        if len(losses) < 2 or not newest:
            return math.nan, math.nan, 0.0
        now = float(np.median(newest)) if all(map(math.isfinite, newest)) else math.nan
        windows = np.lib.stride_tricks.sliding_window_view(losses, min(NEAR, len(losses)))
        noise = float(robust_spread(np.diff(losses)[:, None])[0]) / 2**0.5
        return now, float(np.median(windows, axis=1).min()), noise

    def _losses(self) -> np.ndarray:
        """``[K, 2]`` (step, loss) of the present course."""
        known = self.run.history.recent_losses
        return known[known[:, 0] > self._left_behind]

    def keep(self, snapshot: Snapshot, name: str) -> Snapshot | Path:
        """Hold a snapshot where there is room for it.

        Raises:
            MemoryError: where there is neither memory nor a folder.
        """
        if 2 * snapshot_bytes(self.run) <= self.memory_gb * 1e9:
            return snapshot
        if self.run.run_dir is None:
            raise MemoryError(f"two copies of the run are more than memory_gb {self.memory_gb:g}: raise it, or give a run_dir")
        self.run.run_dir.mkdir(parents=True, exist_ok=True)
        path = self.run.run_dir / f"{name}-{snapshot.step}-rank{_rank()}.pt"
        snapshot.save(path)
        return path

    def state_dict(self) -> dict[str, Any]:
        """Name of the healthy state's file in the run's folder: plain values. One in memory does not outlive the process."""
        return {"healthy": self._healthy.name if isinstance(self._healthy, Path) else None}

    @staticmethod
    def parse_state(state: Mapping[str, Any] | Stored, run_dir: Path | None) -> Path | None:
        """Find the file of a healthy state: one of ours that lies in the run's own folder. What a state names elsewhere is left out.

        Raises:
            ValueError: if it is no state of this.
        """
        healthy = Stored.of(state)["healthy"]
        named = healthy.maybe(Stored.text)
        if named is None:
            return None
        path = None if run_dir is None else _inside(run_dir, named)
        if path is None:
            healthy.leave_out(f"{named!r} is no file of a healthy state in the run's own folder {run_dir}, and is not looked at")
        return path

    def take_up(self, healthy: Path | None) -> None:
        """Go on with what :meth:`parse_state` has found."""
        self._healthy, self._from = healthy, max(1, self.run.step)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Find the healthy state on disk again.

        Raises:
            ValueError: if it is no state of this; nothing is changed then.
        """
        saved = Stored(state)
        self.take_up(self.parse_state(saved, self.run.run_dir))
        if saved.left_out:
            logger.warning("Left out of the resumed state: %s", "; ".join(saved.left_out))

    def _keep(self) -> Snapshot | Path | None:
        if 2 * snapshot_bytes(self.run) > self.memory_gb * 1e9 and self.run.run_dir is None:
            if not self._said:
                logger.warning(
                    "No state is kept to roll back to: two copies need more than memory_gb %g, and there is no run_dir",
                    self.memory_gb,
                )
            self._said = True
            return None
        return self.keep(Snapshot.take(self.run), "healthy")

    @staticmethod
    def _drop(kept: Snapshot | Path | None) -> None:
        if isinstance(kept, Path):
            kept.unlink(missing_ok=True)


def _inside(run_dir: Path, named: str) -> Path | None:
    """The file of that name in ``run_dir``; None where it is none of ours, lies or leads elsewhere, or is not there."""
    given = Path(named)
    try:
        if len(given.parts) > 1 and given.parent.resolve() != run_dir.resolve():  # states of before version 1 hold the whole path
            return None
        path = run_dir / given.name
        ours = re.fullmatch(r"[a-z-]+-\d+-rank\d+\.pt", given.name) is not None
        return path if ours and path.is_file() and not path.is_symlink() else None
    except (OSError, ValueError, RuntimeError):  # a name that no file can have, a circle of links
        return None


def _named(run: TrainingRun) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers of the model, and what else the optimizer steps (masters)."""
    yield from run.model.named_parameters()
    yield from run.model.named_buffers()
    own = {id(parameter) for parameter in run.model.parameters()}
    others = [parameter for parameter, _ in _stepped(run) if id(parameter) not in own]
    yield from ((f"optimizer's own {at}", parameter) for at, parameter in enumerate(others))


def _stepped(run: TrainingRun) -> list[tuple[Tensor, Any]]:
    """Each parameter of each optimizer, beside that optimizer's whole state, which may hold nothing of it yet."""
    return [(each, state_of(group.optimizer)) for group in run.groups for each in group.parameters]


def _copied(value: Any) -> Any:
    """The same value in tensors of its own on the host."""
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value) if type(value) in (list, tuple) else value
    return value


def _restore_entries(entries: dict[str, Any], saved: Mapping[str, Any], device: torch.device) -> None:
    """Make an optimizer's state of one parameter what was saved, in its own tensors where they are still there."""
    for name in set(entries) - set(saved):
        del entries[name]
    for name, value in saved.items():
        now = entries.get(name)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and local(now).shape == value.shape and now.dtype == value.dtype:
            local(now).copy_(value)
        else:
            entries[name] = value.to(device, copy=True) if isinstance(value, Tensor) and value.ndim else _copied(value)


def _rank() -> int:
    return torch.distributed.get_rank() if torch.distributed.is_available() and torch.distributed.is_initialized() else 0
