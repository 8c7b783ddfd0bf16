"""Notice a rate or a decay that jumps before the step that uses it."""

from __future__ import annotations

import math
import statistics
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from stabmon._storage.stored_value import Stored
from stabmon._torch.optimizer_adapter import OptimizerAdapter, ParameterGroup, innermost
from stabmon.engine.step_length.decay_jumps import DecayJumps, shrinks_weights
from stabmon.engine.step_length.group_words import describe_group
from stabmon.engine.step_length.rate_watch import RateWatch
from stabmon.engine.step_length.setting_jumps import RateJumps
from stabmon.engine.updates.group_updates import GroupUpdates
from stabmon.engine.updates.weight_updates import WeightUpdates
from stabmon.interventions import TrainingRun
from stabmon.listeners import StepContext, StepListener
from stabmon.records import Overshoot

NEWEST = 5
"""Sampled steps that show how far a group usually moves at a rate."""


class SettingWatch(StepListener):
    """The listener that compares each group's rate and weight decay with their past, at every step.

    A step whose rate jumps is measured. Where an intervention may hold the rate back, that step and
    those until the guard has judged it are made at the highest rate before the jump, and at no more
    than the multiple of the other groups' rate that it was at. What a step costs is a comparison of
    numbers on the host; at a jump also a copy of the group, of at most 32 MB.

    Args:
        optimizers: the run's optimizers.
        run: the run, with the rates that interventions leave.
        found: receives a finding.
        model: the model that trains.
        sampled: the changes of groups in sampled steps.
    """

    def __init__(
        self,
        optimizers: OptimizerAdapter,
        run: TrainingRun,
        found: RateWatch,
        model: nn.Module,
        sampled: WeightUpdates,
    ) -> None:
        self.jumps, self.decay_jumps = RateJumps(), DecayJumps()
        self.decays: dict[str, float] = {}
        """Weight decay that each group was to use in the newest step, were it not held back."""
        self._optimizers, self._run, self._found, self._model = optimizers, run, found, model
        self._sampled, self._updates = sampled, GroupUpdates()
        self._used: dict[str, float] = {}
        """Rate that each group used in the newest step."""
        self._per_rate: dict[str, deque[float]] = {}
        """Relative update over rate of each group in the newest sampled steps."""
        self._rates: dict[str, float] = {}
        """Rate of each group in this step, without what holds it back."""
        self._shares: dict[str, float] = {}
        """Share of its rate that a group is held back to in this step."""
        self._limits: dict[str, _Limit] = {}
        self._shrinking: dict[str, float] = {}
        """Rate of each group whose decay takes a share of its weights."""

    def before_optimizer_step(self, ctx: StepContext) -> None:
        self._note_sampled()
        groups, stepping = self._optimizers.groups(), innermost(ctx.optimizer)
        rates = {
            group.key: rate
            for group in groups
            if (not stepping or any(group.optimizer is each for each in stepping))
            and (rate := self._run.intended_rate(group)) is not None
        }
        self._rates.update(rates)
        jumped = self.jumps.find(rates)
        self._compare_decays([group for group in groups if group.key in rates])
        if jumped:
            own = [group for group in groups if group.key in jumped]
            self._updates.before(own)
            self._limits = {key: self._limit(key, jumped) for key in jumped}
            if self._run.hold_back is not None:
                most = {group.key: self._limits[group.key].rate(rates) for group in own}
                self._shares |= self._run.hold_back(most)

    def on_step_end(self, ctx: StepContext) -> None:
        rates, self._rates = self._rates, {}
        if not rates:
            self._shrinking = {}
        shares, self._shares = self._shares, {}
        limits, self._limits = self._limits, {}
        updates = {
            key: self._largest(key, update / shares.get(key, 1.0), rates.get(key, 0.0))
            for key, update in self._updates.after().items()
        }
        self._used = {key: rate * shares.get(key, 1.0) for key, rate in rates.items()}
        far = self.jumps.add(rates, updates, self._update_of_others(rates, updates))
        accepted = [key for key in shares if key not in far and updates.get(key, 0.0) != 0]
        if accepted and self._run.hold_back is not None:
            self._run.hold_back(dict.fromkeys(accepted, math.inf))
        groups = {group.key: group for group in self._optimizers.groups()}
        decayed = self.decay_jumps.add(self._shrinking, self.decays)
        self.has_news = bool(far or decayed)
        if decayed and not far:
            self._found.found = Overshoot(
                ctx.step,
                "decay",
                math.nan,
                math.nan,
                dict(self.decays),
                decayed,
                groups={key: describe_group(self._model, groups[key]) for key in decayed},
                updates={key: self._shrinking[key] * self.decays[key] for key in decayed},
            )
        if far:
            own = {key: groups[key] for key in far if key in groups and key in limits}
            self._found.found = Overshoot(
                ctx.step,
                "jump",
                math.nan,
                math.nan,
                dict(rates),
                {key: limits[key].highest for key in own},
                groups={key: describe_group(self._model, each) for key, each in own.items()},
                updates={key: updates[key] for key in own},
                multiples={
                    key: limits[key].multiple for key in own if math.isfinite(limits[key].multiple)
                },
            )

    def close(self) -> None:
        self._run.end_hold_back()

    def state_dict(self) -> dict[str, Any]:
        """Return how far groups usually move: plain values, for a resumed run."""
        self._note_sampled()
        return {"per_rate": {key: list(each) for key, each in self._per_rate.items()}}

    def parse_state(self, state: Stored) -> Callable[[], None]:
        """Read a state whole, and return a function that restores it; None leaves all as it is.

        Raises:
            ValueError: if it is no state of this.
        """
        if state.value is None:
            return lambda: None
        per_rate = {
            key: deque([each.number() for each in values.parts()], maxlen=NEWEST)
            for key, values in state["per_rate"].items()
        }

        def restore() -> None:
            self._per_rate = per_rate

        return restore

    def _note_sampled(self) -> None:
        """Keep how far groups moved in the step before, if that was a sampled one."""
        sampled, self._sampled.newest = self._sampled.newest, {}
        for key, update in sampled.items():
            if update > 0 and (rate := self._used.get(key, 0.0)) > 0:
                self._per_rate.setdefault(key, deque(maxlen=NEWEST)).append(update / rate)

    def _largest(self, key: str, update: float, rate: float) -> float:
        """Return the larger of an update and what such a rate usually moves the group by.

        One step of noisy gradients may be short by chance. No step at all is no answer.
        """
        usual = self._per_rate.get(key)
        return max(update, rate * statistics.median(usual)) if usual and update > 0 else update

    def _update_of_others(self, rates: Mapping[str, float], jumped: Mapping[str, float]) -> float:
        """Return the median relative update of groups that did not jump; infinity if unknown."""
        known = [
            rates.get(key, 0.0) * statistics.median(usual)
            for key, usual in self._per_rate.items()
            if key not in jumped and rates.get(key, 0.0) > 0
        ]
        return statistics.median(known) if jumped and known else math.inf

    def _compare_decays(self, groups: Sequence[ParameterGroup]) -> None:
        """Compare the weight decay of groups that are about to be stepped with their past."""
        decays = {
            group.key: decay
            for group in groups
            if shrinks_weights(group) and (decay := self._run.decays.used(group)) is not None
        }
        self.decays.update(decays)
        self._shrinking = {key: self._rates[key] for key in self.decays if key in self._rates}
        jumped = self.decay_jumps.find(self._shrinking, decays)
        if jumped and self._run.hold_back_decay is not None:
            self._run.hold_back_decay(jumped)

    def _limit(self, key: str, jumped: Mapping[str, float]) -> _Limit:
        """Return the limit of a group, whose rate is to keep its relation to those that stay."""
        others = [each.key for each in self._optimizers.groups() if each.key not in jumped]
        return _Limit(jumped[key], self.jumps.multiple(key, others), tuple(others))


@dataclass(frozen=True)
class _Limit:
    """The largest rate of a group that has jumped."""

    highest: float
    """Its highest rate before."""
    multiple: float
    """Multiple of the other groups' median rate that it was at before; infinity if unknown."""
    others: tuple[str, ...]

    def rate(self, rates: Mapping[str, float]) -> float:
        """Return the limit beside the rates of the other groups."""
        known = [rate for key in self.others if (rate := rates.get(key, 0.0)) > 0]
        follows = self.multiple * statistics.median(known) if known else math.inf
        return min(self.highest, follows)
