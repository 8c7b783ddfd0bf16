"""Choose the next intervention: by open alarms, by what was tried, and by what is left to spend."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from stabmon._storage.stored_value import Stored
from stabmon.guard.symptoms import (
    RENAMED,
    Key,
    alarms_now,
    key_of,
    keys_of,
    promoted_among,
    treated_in_order,
    without_symptom,
)
from stabmon.interventions.base import Applied, Intervention
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import StabilityIssue
from stabmon.rules.symptoms import Symptom

logger = logging.getLogger("stabmon")

Outcome = Literal["pending", "worked", "failed"]
Alarm = tuple[StabilityIssue, Symptom]


@dataclass(eq=False)
class Trial:
    """An intervention that was applied, and its outcome."""

    applied: Applied
    keys: tuple[Key, ...]
    since: int
    """The sample at which it was applied, or the last at which an alarm of its keys was open."""
    outcome: Outcome = "pending"
    reason: str = ""
    """Why it is taken back, where it is."""


@dataclass(eq=False)
class Policy:
    """Remembers what was tried, and repeats nothing where it failed or did not fit."""

    interventions: Mapping[str, Intervention]
    """What may be done, by name, with its settings."""
    budget: Budget = field(default_factory=Budget)
    trials: list[Trial] = field(default_factory=list)
    samples: int = 0
    gave_up: dict[Key, str] = field(default_factory=dict)
    """Locations about which nothing more will be done, and advice to a person."""
    _ruled_out: dict[Key, set[str]] = field(default_factory=dict)
    _advice: dict[Key, str] = field(default_factory=dict)

    def propose(
        self, open_issues: Sequence[StabilityIssue], run: TrainingRun
    ) -> Intervention | None:
        """Choose the next intervention, for every alarm that it is the next choice for.

        Alarms that are left without a choice are noted in ``gave_up``, once.

        Args:
            open_issues: every issue that is open now.
            run: the run.

        Returns:
            The intervention, aimed at its alarms; None where nothing is to be done, or nothing left.
        """
        alarms = alarms_now(open_issues, run)
        self._renew(alarms)
        self._note_untreated(open_issues)
        pending = [trial for trial in self.trials if trial.outcome == "pending"]
        busy = {key for trial in pending for key in trial.keys}
        whole_run = any(trial.applied.intervention.affects_whole_run for trial in pending)
        if (due := self._due(alarms, run)) is not None:
            return due
        present = {symptom.name: symptom for _, symptom in alarms}
        promoted = promoted_among(present.values())
        for symptom in treated_in_order(present.values()):
            waits = symptom.name not in promoted and any(
                key[0] in symptom.waits_for for key in busy
            )
            if waits:
                return None  # a known cause is being treated
            own = [issue for issue, each in alarms if each.name == symptom.name]
            keys = dict.fromkeys(key_of(issue, symptom) for issue in own)
            is_busy = any(key in busy for key in keys)
            if is_busy and (symptom.exclusive or whole_run):
                if symptom.passes_on == "always":
                    continue
                return None  # wait and see
            chosen = self._choose(symptom, own, busy, whole_run, run)
            if chosen is not None:
                return chosen
            beside = any(name in present for name in symptom.passes_on_beside)
            idle = symptom.passes_on == "idle" and not is_busy
            if not (symptom.passes_on == "always" or idle or beside):
                return None  # nothing is done about its consequences
        return None

    def note_applied(self, applied: Applied) -> None:
        """Take note of an intervention that was applied, proposed here or by a person."""
        self.trials.append(Trial(applied, keys_of(applied.intervention.issues), self.samples))

    def note_refused(self, intervention: Intervention, error: NotApplicable) -> None:
        """Do not propose again, for these locations, an intervention that did not fit.

        A person's own with other settings does not count against ours.
        """
        name = intervention.name
        if name in self.interventions and intervention != self.interventions[name]:
            return
        for key in keys_of(intervention.issues):
            self._ruled_out.setdefault(key, set()).add(name)
            if error.advice:
                self._advice[key] = f"{error.reason}: {error.advice}"

    def judge(
        self, open_issues: Sequence[StabilityIssue], run: TrainingRun, *, let_go: bool = True
    ) -> list[Trial]:
        """Decide at a sample which interventions worked; a person's own are left as they are.

        Returns:
            Trials whose act is to be taken back for their ``reason``: it is at an end by itself, or
            failed and costs a healthy run something. What need be held no longer is released here,
            if ``let_go``.
        """
        self.samples += 1
        open_keys = {key_of(issue, symptom) for issue, symptom in alarms_now(open_issues, run)}
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
                trial.outcome = self._outcome(trial, open_keys)
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
            elif trial.outcome != "pending" and open_keys & set(trial.keys):
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
        """Everything but the interventions' own states; ``applied`` gives each its number."""
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

    def _choose(
        self,
        symptom: Symptom,
        alarms: Sequence[StabilityIssue],
        busy: Collection[Key],
        whole_run: bool,
        run: TrainingRun,
    ) -> Intervention | None:
        """Choose for the alarms of one symptom, and note those without a choice."""
        keys = dict.fromkeys(key_of(issue, symptom) for issue in alarms)
        choices = {key: self._next(key, run) for key in keys if key not in busy}
        for key, (name, why) in choices.items():
            if not name and key not in self.gave_up:
                advice = self._advice.get(key) or _said(alarms, symptom) or symptom.advice
                self.gave_up[key] = f"{why}; {advice}"
        names = {name for name, _ in choices.values() if name}
        names -= {each for each in names if whole_run and self._affects_whole_run(each)}
        if not names:
            return None
        name = min(names, key=lambda each: (self._order(each, symptom.name), each))
        chosen = {key for key, (each, _) in choices.items() if each == name}
        return self._aim(name, [i for i in alarms if key_of(i, symptom) in chosen])

    def _due(self, alarms: Sequence[Alarm], run: TrainingRun) -> Intervention | None:
        """Return an intervention that comes next whatever the order, for the alarms it is due for."""
        for name, intervention in self.interventions.items():
            due = [
                issue
                for issue, symptom in alarms
                if intervention.is_due(issue, self._tried_for(issue, symptom))
                and self._may_be_tried(name, key_of(issue, symptom), run)
            ]
            if due:
                return self._aim(name, due)
        return None

    def _tried_for(self, issue: StabilityIssue, symptom: Symptom) -> list[Applied]:
        """Return what was applied for an issue since its cause was found."""
        since, key = _found_at(issue), key_of(issue, symptom)
        tried = (trial.applied for trial in self.trials if key in trial.keys)
        return [applied for applied in tried if applied.step >= since]

    def _renew(self, alarms: Sequence[Alarm]) -> None:
        """Allow interventions that may be repeated for an alarm whose cause was found anew."""
        for issue, symptom in alarms:
            since, key = _found_at(issue), key_of(issue, symptom)
            old = [
                trial
                for trial in self.trials
                if key in trial.keys
                and trial.applied.step < since
                and trial.applied.intervention.renews
            ]
            for trial in old:
                trial.keys = tuple(each for each in trial.keys if each != key)
                self._ruled_out.get(key, set()).discard(trial.applied.intervention.name)
            if old:
                self.gave_up.pop(key, None)

    def _note_untreated(self, open_issues: Sequence[StabilityIssue]) -> None:
        """Note alarms whose rule declares no symptom: they are not dropped without a word."""
        for issue in without_symptom(open_issues):
            key = (issue.issue_type, issue.layer, issue.head)
            if key not in self.gave_up:
                self.gave_up[key] = (
                    f"the rule of {issue.issue_type} declares no symptom, so that no intervention "
                    f"treats it; {issue.suggestion}"
                )

    def _outcome(self, trial: Trial, open_keys: Collection[Key]) -> Outcome:
        still = [key for key in trial.keys if key in open_keys]
        self._rule_out(trial, still)
        return "failed" if still and len(still) == len(trial.keys) else "worked"

    def _rule_out(self, trial: Trial, keys: Sequence[Key]) -> None:
        for key in keys:
            self._ruled_out.setdefault(key, set()).add(trial.applied.intervention.name)

    def _next(self, key: Key, run: TrainingRun) -> tuple[str, str]:
        """Return the first intervention to try at a location, and "", else "" and why there is none."""
        if len(self.trials) >= self.budget.max_interventions:
            return "", f"all {self.budget.max_interventions} interventions of the budget are spent"
        spent = sum(key in trial.keys for trial in self.trials)
        if spent >= self.budget.max_per_location:
            return "", f"{spent} interventions were tried here already"
        allowed = [name for name in self.interventions if self._order(name, key[0]) < NEVER]
        allowed.sort(key=lambda name: (self._order(name, key[0]), name))
        left = [name for name in allowed if self._may_be_tried(name, key, run)]
        if left:
            return left[0], ""
        reasons = [self.interventions[name].unsuited(run, key[0]) for name in allowed]
        if why := next(filter(None, reasons), ""):
            return "", why
        if allowed:
            return "", f"{', '.join(allowed)} failed or did not fit"
        return "", "no intervention that is allowed treats this"

    def _may_be_tried(self, name: str, key: Key, run: TrainingRun) -> bool:
        """Return whether an intervention has not failed at a location, suits it and is affordable."""
        if len(self.trials) >= self.budget.max_interventions:
            return False
        if sum(key in trial.keys for trial in self.trials) >= self.budget.max_per_location:
            return False
        if name in self._ruled_out.get(key, ()):
            return False
        intervention = self.interventions[name]
        uses = sum(trial.applied.intervention.name == name for trial in self.trials)
        return not intervention.unsuited(run, key[0]) and intervention.affordable(
            run, self.budget, uses
        )

    def _order(self, name: str, symptom: str) -> float:
        """Return the place of an intervention among what treats a symptom."""
        order = self.interventions[name].order_for(symptom)
        return NEVER if order is None else order

    def _affects_whole_run(self, name: str) -> bool:
        return self.interventions[name].affects_whole_run

    def _aim(self, name: str, issues: Sequence[StabilityIssue]) -> Intervention:
        return self.interventions[name].aimed_at(issues, self._why(issues))

    def _why(self, issues: Sequence[StabilityIssue]) -> str:
        kinds = ", ".join(dict.fromkeys(issue.issue_type for issue in issues))
        where = issues[0].where
        if len(issues) > 1:
            where = f"{len(issues)} places, first {where}"
        ruled_out = (self._ruled_out.get(key, ()) for key in keys_of(issues))
        before = sorted({name for names in ruled_out for name in names})
        return f"{kinds} at {where}" + (
            f"; {', '.join(before)} failed or did not fit" if before else ""
        )


NEVER = float("inf")
"""Place of an intervention that does not treat a symptom."""


def _found_at(issue: StabilityIssue) -> int:
    """Return the step at which an issue's cause was found; 0 where it does not say."""
    found = issue.evidence.get("found_at", 0)
    return int(found) if isinstance(found, (int, float)) else 0


def _said(alarms: Sequence[StabilityIssue], symptom: Symptom) -> str:
    """Return what an alarm of an exclusive symptom says of its own cause."""
    said = (issue.suggestion for issue in alarms if issue.evidence.get("cause"))
    return next(said, "") if symptom.exclusive else ""


def stored_key(saved: Stored) -> Key:
    """Read a key as it is stored.

    Raises:
        ValueError: if it is none.
    """
    name, layer, head = saved.parts(3)
    symptom = name.text()
    return (
        RENAMED.get(symptom, symptom),
        layer.maybe(Stored.text),
        head.maybe(Stored.integer),
    )


def _pairs(saved: Stored) -> list[tuple[Stored, Stored]]:
    pairs = [each.parts(2) for each in saved.parts()]
    return [(first, second) for first, second in pairs]
