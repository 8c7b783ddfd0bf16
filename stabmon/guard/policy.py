"""Which intervention next: by what is ill, what was tried already, and what is left to spend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Annotated, Any, Literal, cast, get_args

from stabmon._settings import Bounds, Count, check, renamed
from stabmon._storage.stored_value import Stored
from stabmon.guard.symptoms import (
    ADVICE,
    FAMILIES,
    ORDER,
    PREVENTIVE,
    Family,
    Key,
    family_of,
    in_order,
    key_of,
)
from stabmon.interventions.base import Applied, Intervention, NotApplicable
from stabmon.records import NonFinite, StabilityIssue

if TYPE_CHECKING:
    from stabmon.interventions.run.training_run import TrainingRun

logger = logging.getLogger("stabmon")

Outcome = Literal["pending", "worked", "failed"]


@renamed(
    acts="max_interventions",
    per_place="max_per_location",
    rollbacks="max_rollbacks",
    least_rate="min_lr_scale",
    hold="release_after",
)
@dataclass(frozen=True)
class Budget:
    """Limits of what may be done to one run. Samples are sampled optimizer steps."""

    max_interventions: Annotated[int, Bounds(0)] = 20
    """Interventions in a run."""
    max_per_location: Annotated[int, Bounds(0)] = 3
    """Interventions on one head, or on the run as a whole for one kind of issue."""
    max_rollbacks: Annotated[int, Bounds(0)] = 3
    """Rollbacks in a run."""
    min_lr_scale: Annotated[float, Bounds(above=0, high=1)] = 0.05
    """Lowest share of the scheduled learning rate that interventions may leave."""
    patience: Count = 4
    """Samples after which an intervention is judged by whether its alarm is still open."""
    release_after: Count = 20
    """Samples without an alarm after which an intervention that is held is ended, if it had nothing
    to do in them, and loosened if it had.
    """

    def __post_init__(self) -> None:
        check(self, key="budget")


@dataclass(eq=False)
class Trial:
    """An act that was applied, and what became of what it was for."""

    applied: Applied
    keys: tuple[Key, ...]
    since: int
    """The sample at which it was applied, or the last at which an alarm of its keys was open."""
    outcome: Outcome = "pending"
    reason: str = ""
    """Why it is taken back, where it is."""


@dataclass(eq=False)
class Policy:
    """Remembers what was tried, and never repeats for a place what failed there or did not fit."""

    acts: Mapping[str, Intervention]
    """What may be done, by name, with its settings."""
    budget: Budget = field(default_factory=Budget)
    trials: list[Trial] = field(default_factory=list)
    samples: int = 0
    gave_up: dict[Key, str] = field(default_factory=dict)
    """What nothing more will be done about, and what a person can do."""
    _ruled_out: dict[Key, set[str]] = field(default_factory=dict)
    _advice: dict[Key, str] = field(default_factory=dict)

    def propose(
        self, open_issues: Sequence[StabilityIssue], run: TrainingRun
    ) -> Intervention | None:
        """The next act, aimed at every alarm that it is the next choice for; None where there is
        nothing to do or nothing left.

        What is left without a choice is noted in ``gave_up``, once.
        """
        alarms = alarms_now(open_issues, run)
        self._renew(alarms)
        pending = [trial for trial in self.trials if trial.outcome == "pending"]
        busy = {key for trial in pending for key in trial.keys}
        affects_whole_run = any(trial.applied.intervention.affects_whole_run for trial in pending)
        if again := self._begin_again(alarms, run):
            return self.acts["rollback"].aimed_at(again, self._why("rollback", again))
        families = {family_of(issue) for issue in alarms}
        for family in in_order(families):
            if (
                family == "loss"
                and "rate" not in families
                and any(key[0] == "drive" for key in busy)
            ):
                return None  # a known cause is being treated
            waiting = dict.fromkeys(key_of(issue) for issue in alarms if family_of(issue) == family)
            if any(key in busy for key in waiting) and (
                family == "non_finite" or affects_whole_run
            ):
                if family in ("rate", "drive"):
                    continue
                return None  # wait and see
            choices = {key: self._next(key, run) for key in waiting if key not in busy}
            for key, (_, why) in choices.items():
                if not choices[key][0] and key not in self.gave_up:
                    self.gave_up[key] = (
                        f"{why}; {self._advice.get(key) or _mend(alarms, key) or ADVICE[family]}"
                    )
            names = [
                name
                for name, _ in choices.values()
                if name and not (affects_whole_run and self.acts[name].affects_whole_run)
            ]
            if names:
                name = min(names, key=self._order(family).index)
                chosen = {key for key, (each, _) in choices.items() if each == name}
                issues = [issue for issue in alarms if key_of(issue) in chosen]
                return self.acts[name].aimed_at(issues, self._why(name, issues))
            waits = any(key in busy for key in waiting)
            if not (
                family in ("rate", "drive")
                or (family == "loss" and not waits)
                or (family == "scores" and "step" in families)
            ):
                # a known cause is being treated, or nothing can be done: no act on its consequences
                return None
        return None

    def _begin_again(
        self, alarms: Sequence[StabilityIssue], run: TrainingRun
    ) -> list[StabilityIssue]:
        """Alarms of a rate that was too high from the start, or of a layer that is moved too far,
        once that is capped: what was trained so is not worth keeping."""
        return [
            issue
            for issue in alarms
            if (family_of(issue) == "step" or issue.evidence.get("fitting_rate") is not None)
            and any(self._capped(trial) for trial in self._trials_of(issue))
            and all(
                trial.applied.intervention.name != "rollback" for trial in self._trials_of(issue)
            )
            and self._may_be_tried("rollback", key_of(issue), run)
        ]

    def _capped(self, trial: Trial) -> bool:
        """Whether an act holds what was too fast, and left the steps that were already made as they
        are.
        """
        caps = ("cap_learning_rate", "cap_query_key_update")
        return trial.applied.intervention.name in caps and not trial.applied.effect.after.get(
            "shortened"
        )

    def _trials_of(self, issue: StabilityIssue) -> list[Trial]:
        """What was tried for an issue since what it rests on was found."""
        since = _found_at(issue)
        return [
            trial
            for trial in self.trials
            if key_of(issue) in trial.keys and trial.applied.step >= since
        ]

    def _renew(self, alarms: Sequence[StabilityIssue]) -> None:
        """Acts that may be done again for something newly found: what came of them before does not
        count against them.
        """
        for issue in alarms:
            since, key = _found_at(issue), key_of(issue)
            old = [
                t
                for t in self.trials
                if key in t.keys and t.applied.step < since and t.applied.intervention.renews
            ]
            for trial in old:
                trial.keys = tuple(each for each in trial.keys if each != key)
                self._ruled_out.get(key, set()).discard(trial.applied.intervention.name)
            if old:
                self.gave_up.pop(key, None)

    def note_applied(self, applied: Applied) -> None:
        """An act that :meth:`propose` gave, or a person's own, was applied."""
        keys = tuple(
            dict.fromkeys(
                key_of(i) for i in applied.intervention.issues if i.issue_type in FAMILIES
            )
        )
        self.trials.append(Trial(applied, keys, self.samples))

    def note_refused(self, act: Intervention, error: NotApplicable) -> None:
        """An act did not fit; for these places it is not proposed again. A person's own with other
        settings says nothing of ours.
        """
        if act.name in self.acts and act != self.acts[act.name]:
            return
        for key in map(key_of, act.issues):
            self._ruled_out.setdefault(key, set()).add(act.name)
            if error.advice:
                self._advice[key] = f"{error.reason}: {error.advice}"

    def judge(
        self, open_issues: Sequence[StabilityIssue], run: TrainingRun, *, let_go: bool = True
    ) -> list[Trial]:
        """Once a sample: say of each act whether it worked. What a person applied is neither taken
        back nor released.

        Returns:
            Trials whose act is to be taken back for their ``reason``: it is at an end by itself, or
            failed and costs a healthy run something. What need be held no longer is released here,
            if ``let_go``.
        """
        self.samples += 1
        ill = {key_of(issue) for issue in alarms_now(open_issues, run)}
        failed = []
        for trial in self.trials:
            age = self.samples - trial.since
            ours = not trial.applied.by_hand
            if trial.applied.active and trial.applied.effect.given_up and not trial.reason:
                self._rule_out(trial, trial.keys)
                trial.outcome, trial.reason = "failed", trial.applied.effect.given_up
                if ours:
                    failed.append(trial)
                else:
                    logger.warning(
                        "%s does nothing any more: %s; undo it",
                        trial.applied.intervention.name,
                        trial.reason,
                    )
            if trial.outcome == "pending" and age >= self.budget.patience:
                trial.outcome = self._outcome(trial, ill)
                if (
                    trial.outcome == "failed"
                    and ours
                    and trial.applied.active
                    and trial.applied.intervention.cost > 0
                ):
                    trial.reason = (
                        f"what it was for is still open after {age} samples, and a "
                        "healthy run pays for it"
                    )
                    failed.append(trial)
                trial.since = self.samples
            elif trial.outcome != "pending" and ill & set(trial.keys):
                trial.since = self.samples
            elif (
                let_go
                and ours
                and trial.outcome != "pending"
                and trial.applied.active
                and age >= self.budget.release_after
            ):
                if trial.applied.effect.was_active():
                    trial.since = self.samples
                    trial.applied.relax()
                else:
                    trial.applied.release(
                        f"no alarm for {age} samples, in which it had nothing to do"
                    )
        return failed

    def state_dict(self, applied: Sequence[Applied]) -> dict[str, Any]:
        """Everything but the acts' own states, as plain values; ``applied`` gives each act its
        number.
        """
        return {
            "samples": self.samples,
            "trials": [
                [applied.index(t.applied), [list(k) for k in t.keys], t.since, t.outcome]
                for t in self.trials
            ],
            "ruled_out": [[list(key), sorted(names)] for key, names in self._ruled_out.items()],
            "gave_up": [[list(key), words] for key, words in self.gave_up.items()],
        }

    def parse_state(
        self, state: Mapping[str, Any] | Stored, kept: Sequence[bool]
    ) -> Callable[[Sequence[Applied]], None]:
        """Read a state whole, and return what takes it up, given the acts that are kept.

        Args:
            state: what :meth:`state_dict` gave.
            kept: for each act of the state whether it is known today; trials of the others are left
                out with them.

        Raises:
            ValueError: if it is no policy's state.
        """
        saved = Stored.of(state)
        number = {at: sum(kept[:at]) for at, known in enumerate(kept) if known}
        samples = saved["samples"].integer()
        trials: list[tuple[int, tuple[Key, ...], int, Outcome]] = []
        for each in saved["trials"].parts():
            at, keys, since, outcome = each.parts(4)
            if at.integer() >= len(kept):
                raise ValueError(f"{at.where} is {at.value}, but there are {len(kept)} acts")
            result = cast(Outcome, outcome.one_of(get_args(Outcome)))
            trial = (
                number.get(at.integer(), -1),
                tuple(map(stored_key, keys.parts())),
                since.integer(),
                result,
            )
            if kept[at.integer()]:
                trials.append(trial)
        ruled_out = {
            stored_key(key): set(map(Stored.text, names.parts()))
            for key, names in _pairs(saved["ruled_out"])
        }
        gave_up = {stored_key(key): words.text() for key, words in _pairs(saved["gave_up"])}

        def take_up(applied: Sequence[Applied]) -> None:
            self.samples, self._ruled_out, self.gave_up = samples, ruled_out, gave_up
            self.trials = [
                Trial(applied[at], keys, since, outcome) for at, keys, since, outcome in trials
            ]

        return take_up

    def _outcome(self, trial: Trial, ill: Collection[Key]) -> Outcome:
        still = [key for key in trial.keys if key in ill]
        self._rule_out(trial, still)
        return "failed" if still and len(still) == len(trial.keys) else "worked"

    def _rule_out(self, trial: Trial, keys: Sequence[Key]) -> None:
        for key in keys:
            self._ruled_out.setdefault(key, set()).add(trial.applied.intervention.name)

    def _order(self, family: Family) -> tuple[str, ...]:
        return (*ORDER[family], *PREVENTIVE)

    def _next(self, key: Key, run: TrainingRun) -> tuple[str, str]:
        """The first act for a place that may still be tried; else an empty name, and why there is
        none.
        """
        if len(self.trials) >= self.budget.max_interventions:
            return "", f"all {self.budget.max_interventions} acts of the budget are spent"
        spent = sum(key in trial.keys for trial in self.trials)
        if spent >= self.budget.max_per_location:
            return "", f"{spent} acts were tried here already"
        allowed = [name for name in self._order(key[0]) if name in self.acts]
        if key[0] == "non_finite" and (found := _weights_finite(run)) is not None:
            if found.skipped > 2 * found.search and self._may_be_tried("stop", key, run):
                return "stop", ""
            return "", "the weights are finite, so that going back mends nothing"
        left = [name for name in allowed if self._may_be_tried(name, key, run)]
        if left:
            return left[0], ""
        return (
            "",
            f"{', '.join(allowed)} failed or did not fit"
            if allowed
            else "no act that is allowed repairs this",
        )

    def _may_be_tried(self, name: str, key: Key, run: TrainingRun) -> bool:
        """Whether an act is allowed, has not failed here, fits and can be afforded."""
        within = (
            len(self.trials) < self.budget.max_interventions
            and sum(key in t.keys for t in self.trials) < self.budget.max_per_location
        )
        return (
            within
            and name in self.acts
            and name not in self._ruled_out.get(key, ())
            and self._fits(name, key, run)
        )

    def _fits(self, name: str, key: Key, run: TrainingRun) -> bool:
        """Whether an act is one for such a place, and can be afforded."""
        act, family = self.acts[name], key[0]
        if name == "rollback":
            return (
                sum(trial.applied.intervention.name == name for trial in self.trials)
                < self.budget.max_rollbacks
            )
        if name == "lower_learning_rate":
            if getattr(act, "where", None) == "query_key":
                return family in ("drive", "scores", "step")
            return run.rate_factor * float(getattr(act, "factor", 1.0)) >= self.budget.min_lr_scale
        return True

    def _why(self, name: str, issues: Sequence[StabilityIssue]) -> str:
        kinds = ", ".join(dict.fromkeys(issue.issue_type for issue in issues))
        where = (
            issues[0].where
            if len(issues) == 1
            else f"{len(issues)} places, first {issues[0].where}"
        )
        before = sorted(
            {each for issue in issues for each in self._ruled_out.get(key_of(issue), ())}
        )
        return f"{kinds} at {where}" + (
            f"; {', '.join(before)} failed or did not fit" if before else ""
        )


BACK_WHEN: Mapping[str, tuple[str, int, float]] = {
    "entropy_collapse": ("normalized_entropy", 1, 0.5),
    "logit_growth": ("max_logit", -1, 1.0),
}
"""Signal of an issue, whether it is well above (1) or below (-1), and of what share of the issue's
threshold. A clipped head sits at twice its old scores, so at less than its old entropy; half of the
threshold is far from saturated, and training takes it from there."""


def alarms_now(open_issues: Sequence[StabilityIssue], run: TrainingRun) -> list[StabilityIssue]:
    """The open alarms that something can be done about, without those whose head is on its way back
    (see :data:`BACK_WHEN`).

    An issue closes only well beyond its threshold and some samples later; to act on a head that is
    on its way there costs, and repairs nothing.
    """
    alarms = [issue for issue in open_issues if issue.is_alarm and issue.issue_type in FAMILIES]
    return [issue for issue in alarms if not _is_back(issue, run)]


def _found_at(issue: StabilityIssue) -> int:
    """The step at which what an issue rests on was found; 0 where it does not say."""
    found = issue.evidence.get("found_at", 0)
    return int(found) if isinstance(found, (int, float)) else 0


def _weights_finite(run: TrainingRun) -> NonFinite | None:
    """The newest finding of what is not finite, where it has not reached the weights; else None."""
    found = next(
        (each.non_finite for each in reversed(run.history.readings) if each.non_finite is not None),
        None,
    )
    return found if found is not None and found.touched in ("nothing", "gradients") else None


def _mend(alarms: Sequence[StabilityIssue], key: Key) -> str:
    """What an alarm of something that is not finite says of its cause."""
    said = [
        issue.suggestion
        for issue in alarms
        if key_of(issue) == key and key[0] == "non_finite" and issue.evidence.get("cause")
    ]
    return said[0] if said else ""


def _is_back(issue: StabilityIssue, run: TrainingRun) -> bool:
    if (
        issue.issue_type not in BACK_WHEN
        or issue.head is None
        or issue.layer not in run.history.layers
    ):
        return False
    signal, side, share = BACK_WHEN[issue.issue_type]
    share = (
        1.0 if issue.evidence.get("from_the_start") else share
    )  # there is no better past that it is on its way to
    now = run.history.now(signal)[run.history.of_layer(issue.layer)][issue.head]
    return bool(side * now > side * share * issue.threshold)


def stored_key(saved: Stored) -> Key:
    """A key as it is stored.

    Raises:
        ValueError: if it is none.
    """
    family, layer, head = saved.parts(3)
    return cast(Family, family.text()), layer.maybe(Stored.text), head.maybe(Stored.integer)


def _pairs(saved: Stored) -> list[tuple[Stored, Stored]]:
    pairs = [each.parts(2) for each in saved.parts()]
    return [(first, second) for first, second in pairs]
