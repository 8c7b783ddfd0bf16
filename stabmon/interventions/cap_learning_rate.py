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
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.lower_learning_rate import Held
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable


@intervention
@dataclass(frozen=True)
class CapLearningRate(Intervention):
    r"""Hold the rate of fast parameter groups in bounds.

    The optimizer uses :math:`\min(\eta, \eta_\text{cap})` instead of the scheduled rate
    :math:`\eta`. The ceiling is ``times`` a rate that the issue names for the group: the rate at
    which its steps would have fitted (``fitting_rates``), where they were seen to be too long, or
    else the largest rate scheduled for it before it jumped (``highest_rates_before``). Of a group
    that is ahead of the others from the start it is a multiple of the median of their scheduled
    rates (``fitting_multiples``), and follows their warm-up and decay.

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

    treats: ClassVar[Mapping[str, int]] = {"rate": 10}

    renews: ClassVar[bool] = True

    times: Factor = 1.0
    """Ceiling of a group, as a multiple of the rate that the issue names for it."""
    cap: Factor | None = None
    """Ceiling of every group, a learning rate; None to take each group's from the issues."""

    def _start(self, run: TrainingRun) -> Effect:
        if self.cap is not None:
            return self._hold(run, dict.fromkeys(_rates(run), self.cap), {})
        evidence = [issue.evidence for issue in self.issues if issue.issue_type == "update_spike"]
        multiples = self._lowest([each.get("fitting_multiples", {}) for each in evidence])
        caps = self._lowest([_named_ceilings(each, run) for each in evidence])
        if not caps and not multiples:
            raise NotApplicable(
                "it is not known which rate was too high: give an issue of type update_spike, or "
                "a cap"
            )
        by_probe = all(
            each.get("found_at") == run.step and each.get("how") != "leap" for each in evidence
        )
        return self._hold(run, caps, multiples, shorten=by_probe)

    def _lowest(self, named: Sequence[Mapping[str, float]]) -> dict[str, float]:
        """Return ``times`` the lowest value that is named for each group."""
        keys = dict.fromkeys(key for each in named for key in each)
        return {
            key: self.times * float(min(each[key] for each in named if key in each)) for key in keys
        }

    def check_saved(self, effect: Stored) -> None:
        if "multiples" in effect:
            effect["multiples"].numbers()
        if "caps" in effect:
            effect["caps"].numbers()
        else:  # stored when one ceiling held for all groups
            effect["cap"].number()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
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
            multiples: of groups without a ceiling of their own, multiples of the median scheduled
                rate of groups that are not in here.
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
            return {**{key: each * most for key, each in multiples.items()}, **caps}

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
    multiple of the others' rate are left out.
    """
    if evidence.get("fitting_multiples"):
        return {}
    for name in ("fitting_rates", "highest_rates_before"):
        caps = evidence.get(name)
        if isinstance(caps, Mapping) and caps:
            return {str(key): float(cap) for key, cap in caps.items()}
    cap = evidence.get("highest_rate_before", evidence.get("fitting_rate"))
    if not isinstance(cap, (int, float)) or cap <= 0:
        return {}
    return dict.fromkeys(_rates(run), float(cap))
