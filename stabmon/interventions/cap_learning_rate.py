"""A ceiling on the learning rate, from rates of the run's own past."""

from __future__ import annotations

import functools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

from stabmon._settings import Factor
from stabmon._storage.stored_value import Stored
from stabmon._torch.callbacks.weak_method import weakly
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.lower_learning_rate import Held
from stabmon.interventions.run.prepared import Prepared
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable

PROBED = ("first_step", "brisk", "steps", "torn")
"""Kinds of evidence for which a copy of the newest step is there, so that it can be shortened."""


@intervention
@dataclass(frozen=True)
class CapLearningRate(Intervention):
    r"""Hold the rate of fast parameter groups in bounds.

    The optimizer uses :math:`\min(\eta, \eta_\text{cap})` instead of the scheduled rate
    :math:`\eta`. The ceiling is ``times`` a rate that the issue names for the group: the rate at
    which its steps would have fitted (``fitting_rates``), where they were seen to be too long, or
    else the largest rate scheduled for it before it jumped (``highest_rates_before``). A group that
    jumps alone, or is ahead of the others from the start, also keeps to a multiple of the median of
    their scheduled rates (``fitting_multiples``), and so follows their warm-up and decay.

    Weight decay that jumped is used at what it was before (``decays_before``), by the same means.

    Where guard may use it, a rate or decay that jumps is held back in the very step that would have
    used it.

    Where a probe found the newest step too long, that step is shortened to the ceiling as well.
    Groups that are not too fast keep their rates, and a scheduled rate below the ceiling is used as
    it is: a healthy run pays nothing. Of two ceilings on one group the lower counts. Schedulers,
    checkpoints and loggers see the rates that they set.

    Example:
        >>> import torch
        >>> model = torch.nn.Linear(2, 1)
        >>> run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.5))
        >>> applied = CapLearningRate(cap=0.1).apply(run)
        >>> applied.record["before"]["lr"], applied.record["after"]["lr"]
        ([0.5], [0.1])
        >>> run.rate_factor
        0.2
        >>> applied.undo(), run.rate_factor
        (True, 1)
    """

    treats: ClassVar[Mapping[str, int]] = {"rate": 10, "decay": 10}

    renews: ClassVar[bool] = True

    times: Factor = 1.0
    """Ceiling of a group, as a multiple of the rate that the issue names for it."""
    cap: Factor | None = None
    """Ceiling of every group, a learning rate; None to take each group's from the issues."""

    def _start(self, run: TrainingRun) -> Effect:
        if self.cap is not None:
            return self._hold(run, dict.fromkeys(_rates(run), self.cap), {})
        evidence = [issue.evidence for issue in self.issues if issue.issue_type == "update_spike"]
        decays = self._lowest([each.get("decays_before", {}) for each in evidence], times=1.0)
        if decays:
            return _cap_decays(run, decays)
        multiples = self._lowest([each.get("fitting_multiples", {}) for each in evidence])
        caps = self._lowest([_named_ceilings(each, run) for each in evidence])
        if not caps and not multiples:
            raise NotApplicable(
                "it is not known which rate was too high: give an issue of type update_spike, or "
                "a cap"
            )
        by_probe = all(
            each.get("found_at") == run.step and each.get("how") in PROBED for each in evidence
        )
        return self._hold(run, caps, multiples, shorten=by_probe)

    def _lowest(
        self, named: Sequence[Mapping[str, float]], times: float | None = None
    ) -> dict[str, float]:
        """Return ``times`` the lowest value that is named for each group."""
        times = self.times if times is None else times
        keys = dict.fromkeys(key for each in named for key in each)
        return {key: times * float(min(each[key] for each in named if key in each)) for key in keys}

    def prepare(self, run: TrainingRun) -> Prepared:
        return _HoldBack(run, self.times)

    def check_saved(self, effect: Stored) -> None:
        if "decays" in effect:
            effect["decays"].numbers()
            return
        if "multiples" in effect:
            effect["multiples"].numbers()
        if "caps" in effect:
            effect["caps"].numbers()
        else:  # stored when one ceiling held for all groups
            effect["cap"].number()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        if "decays" in state:
            return _cap_decays(run, {str(k): float(cap) for k, cap in state["decays"].items()})
        caps = state["caps"] if "caps" in state else dict.fromkeys(_rates(run), float(state["cap"]))
        return self._hold(
            run,
            {str(key): float(cap) for key, cap in caps.items()},
            {str(key): float(each) for key, each in state.get("multiples", {}).items()},
        )

    def _hold(
        self,
        run: TrainingRun,
        caps: Mapping[str, float],
        multiples: Mapping[str, float],
        *,
        shorten: bool = False,
    ) -> Effect:
        """Hold each group below its ceiling.

        Args:
            run: the run.
            caps: ceilings by group.
            multiples: ceilings as multiples of the median scheduled rate of groups that are not in
                here; the lower counts.
            shorten: shorten the newest step to the ceilings.
        """
        # the rates used: a step at a ceiling that is held already is not shortened again
        before = {key: rate * run.rate_factors.get(key, 1.0) for key, rate in _rates(run).items()}
        capped = caps.keys() | multiples.keys()
        if not capped & before.keys():
            raise NotApplicable(
                f"the run no longer has a parameter group {', '.join(sorted(capped))}"
            )

        def ceilings() -> dict[str, float]:
            others = [
                rate for key, rate in _rates(run).items() if key not in multiples and rate > 0
            ]
            most = statistics.median(others) if others else math.inf
            follow = {key: each * most for key, each in multiples.items()}
            return {key: min(caps.get(key, math.inf), follow.get(key, math.inf)) for key in capped}

        def works() -> bool:
            rates = _rates(run)
            return any(rates.get(key, 0.0) > cap for key, cap in ceilings().items())

        now = ceilings()
        after = {key: min(rate, now.get(key, rate)) for key, rate in before.items()}
        put_back = None
        if shorten and run.shorten_step is not None:
            put_back = run.shorten_step(
                {key: after[key] / rate for key, rate in before.items() if rate > after[key]}
            )
        return _Capped(
            undo_=run.rates.cap({key: functools.partial(_entry, ceilings, key) for key in now}),
            works=works,
            before={"lr": list(before.values())},
            after={
                "lr": list(after.values()),
                "caps": now,
                "shortened": put_back is not None,
            },
            note="the step that was too long was shortened to these rates, so that no rollback is "
            "needed"
            if put_back
            else "",
            saved={"caps": dict(caps), "multiples": dict(multiples)},
            run=run,
            put_back=put_back,
        )


class _HoldBack(Prepared):
    """Rates and decays held at their own past in the step at which they jump, until that has been judged."""

    def __init__(self, run: TrainingRun, times: float) -> None:
        self.run, self.times = run, times

    def begin(self) -> None:
        try:
            self.run.rates.expect_jumps()
        except NotApplicable:  # optimizers without step hooks: jumps are capped after the step
            return
        self.run.decays.expect_jumps()
        self.run.hold_back = weakly(self._hold_back)
        self.run.hold_back_decay = weakly(self.run.decays.hold_back)

    def offer(self, healthy: bool) -> None:
        if self.run.hold_back is not None:
            self.run.rates.let_go()
            self.run.decays.let_go()

    def _hold_back(self, ceilings: Mapping[str, float]) -> Mapping[str, float]:
        return self.run.rates.hold_back({key: self.times * each for key, each in ceilings.items()})


@dataclass
class _Capped(Held):
    """Ceilings on the rates of groups, and the shortening of the newest step.

    The shortening can be undone until the next step is made.
    """

    run: TrainingRun | None = None
    put_back: Callable[[], None] | None = None

    def __post_init__(self) -> None:
        if self.run is not None and self.put_back is not None:
            at, run = self.run.step, self.run

            def expire() -> None:
                if run.step > at:
                    self.put_back = None
                    remove()

            remove = run.step_hooks.add("on_step", expire)

    def undo(self) -> bool:
        if self.put_back is not None:
            self.put_back()
            self.put_back = None
        self.release()
        return True


def _cap_decays(run: TrainingRun, caps: Mapping[str, float]) -> Effect:
    """Hold the weight decay of groups below these ceilings."""
    _ = run.torch_optimizers
    groups = [group for group in run.groups if run.decays.scheduled(group) is not None]
    if not caps.keys() & {group.key for group in groups}:
        raise NotApplicable(f"no parameter group {', '.join(sorted(caps))} decays its weights")

    def works() -> bool:
        return any(
            (run.decays.scheduled(group) or 0.0) > caps[group.key]
            for group in run.groups
            if group.key in caps
        )

    before = [run.decays.scheduled(group) for group in groups]
    return Held(
        undo_=run.decays.cap(caps),
        works=works,
        before={"weight_decay": before},
        after={"weight_decay": [run.decays.used(group) for group in groups]},
        saved={"decays": dict(caps)},
    )


def _entry(values: Callable[[], Mapping[str, float]], key: str) -> float:
    return values()[key]


def _rates(run: TrainingRun) -> dict[str, float]:
    """Return the scheduled rate of each parameter group that has one."""
    return {
        group.key: rate for group in run.groups if (rate := run.scheduled_rate(group)) is not None
    }


def _named_ceilings(evidence: Mapping[str, Any], run: TrainingRun) -> dict[str, float]:
    """Return the ceiling of each group that is too fast, from an issue's evidence.

    Where it names no group, the one rate that it names is the ceiling of every group. Groups with a
    multiple of the others' rate have no fitting rate of their own.
    """
    follow = evidence.get("fitting_multiples", {})
    for name in ("fitting_rates", "highest_rates_before"):
        caps = evidence.get(name)
        if isinstance(caps, Mapping) and caps:
            fixed = caps if name.startswith("highest") else caps.keys() - follow.keys()
            return {str(key): float(caps[key]) for key in fixed}
    cap = evidence.get("highest_rate_before", evidence.get("fitting_rate"))
    if not isinstance(cap, (int, float)) or cap <= 0:
        return {}
    return dict.fromkeys(_rates(run), float(cap))
