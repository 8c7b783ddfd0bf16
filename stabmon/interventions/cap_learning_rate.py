"""Hold the learning rate at or below what the run has been trained with before."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from stabmon._settings import Factor
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.lower_learning_rate import Held
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable


@intervention
@dataclass(frozen=True)
class CapLearningRate(Intervention):
    """Hold each parameter group that was too fast at a rate of its own past, or at the one that
    fits it.

    A group is held at ``times`` the largest rate that was scheduled for it before it jumped; where
    steps were seen to be too long, at ``times`` the rate at which they would have fitted, and the
    step that showed it is shortened to that. What is not too fast keeps its rate, and where the
    scheduled rate is lower it is used as it is, so that a healthy run pays nothing. Two caps on one
    group do not add up. Schedulers, checkpoints and loggers see the rates that they set.
    """

    treats: ClassVar[Mapping[str, int]] = {"rate": 10}

    renews: ClassVar[bool] = True

    times: Factor = 1.0
    cap: Factor | None = None
    """The rate to hold every group at, instead."""

    def _start(self, run: TrainingRun) -> Effect:
        if self.cap is not None:
            return self._hold(run, dict.fromkeys(_rates(run), self.cap))
        evidence = [issue.evidence for issue in self.issues if issue.issue_type == "update_spike"]
        told = [caps for each in evidence if (caps := _told(each, run))]
        if not told:
            raise NotApplicable(
                "it is not known which rate was too high: give an issue of type update_spike, or "
                "a cap"
            )
        caps = {
            key: self.times * min(each[key] for each in told if key in each)
            for key in {key for each in told for key in each}
        }
        by_probe = all(
            each.get("found_at") == run.step and each.get("how") != "leap" for each in evidence
        )
        return self._hold(run, caps, shorten=by_probe)

    def check_saved(self, effect: Stored) -> None:
        if "caps" in effect:
            effect["caps"].numbers()
        else:  # of before groups were capped each by its own
            effect["cap"].number()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        caps = state["caps"] if "caps" in state else dict.fromkeys(_rates(run), float(state["cap"]))
        return self._hold(run, {str(key): float(cap) for key, cap in caps.items()})

    def _hold(
        self, run: TrainingRun, caps: Mapping[str, float], *, shorten: bool = False
    ) -> Effect:
        before = _rates(run)
        if not caps.keys() & before.keys():
            raise NotApplicable(f"no parameter group {', '.join(sorted(caps))} is there any more")
        groups = {group.key: group for group in run.groups}

        def works() -> bool:
            return any(
                (run.scheduled_rate(groups[key]) or 0.0) > cap
                for key, cap in caps.items()
                if key in groups
            )

        after = {key: min(rate, caps.get(key, rate)) for key, rate in before.items()}
        put_back = None
        if shorten and run.shorten_step is not None:
            put_back = run.shorten_step(
                {key: after[key] / before[key] for key in caps if before.get(key, 0.0) > after[key]}
            )
        return _Capped(
            undo_=run.rates.cap(dict(caps)),
            works=works,
            before={"lr": list(before.values())},
            after={
                "lr": list(after.values()),
                "caps": dict(caps),
                "shortened": put_back is not None,
            },
            note="the step that showed it was shortened to these rates, so that nothing need be "
            "gone back from"
            if put_back
            else "",
            saved={"caps": dict(caps)},
            run=run,
            put_back=put_back,
        )


@dataclass
class _Capped(Held):
    """Ceilings on the rates of groups; what the newest step was shortened by can be put back until
    the next one is made.
    """

    run: TrainingRun | None = None
    put_back: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.run is not None and self.put_back is not None:
            at, run = self.run.step, self.run

            def forget() -> None:
                if run.step > at:
                    self.put_back = None
                    remove()

            remove = run.step_hooks.add("on_step", forget)

    def undo(self) -> bool:
        if self.put_back is not None:
            self.put_back()
            self.put_back = None
        self.release()
        return True


def _rates(run: TrainingRun) -> dict[str, float]:
    """The scheduled rate of each parameter group that has one."""
    return {
        group.key: rate for group in run.groups if (rate := run.scheduled_rate(group)) is not None
    }


def _told(evidence: Mapping[str, Any], run: TrainingRun) -> dict[str, float]:
    """The ceiling that an issue tells for each group that is too fast; where it names none, all
    groups in the same proportion.
    """
    for name in ("fitting_rates", "highest_rates_before"):
        caps = evidence.get(name)
        if isinstance(caps, Mapping) and caps:
            return {str(key): float(cap) for key, cap in caps.items()}
    cap = evidence.get("highest_rate_before", evidence.get("fitting_rate"))
    rates = _rates(run)
    highest = max(rates.values(), default=0.0)
    if not isinstance(cap, (int, float)) or cap <= 0 or highest <= 0:
        return {}
    return {key: rate * min(1.0, cap / highest) for key, rate in rates.items()}
