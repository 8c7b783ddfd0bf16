"""Choose the next intervention by open alarms, earlier trials and the budget."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stabmon._storage.stored_value import Stored
from stabmon.guard.symptoms import (
    Key,
    alarms_now,
    key_of,
    keys_of,
    promoted_among,
    treated_in_order,
    without_symptom,
)
from stabmon.guard.trials import Trial, Trials, pairs, stored_key
from stabmon.interventions.base import Applied, Intervention
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import StabilityIssue
from stabmon.rules.symptoms import Symptom

Alarm = tuple[StabilityIssue, Symptom]
NEVER = float("inf")
"""Order of an intervention that does not treat a symptom."""


@dataclass(eq=False)
class Policy:
    """The choice among interventions; none is repeated where it failed or did not fit.

    Args:
        interventions: those allowed, by name, with their settings.
        budget: limits of what may be done.
    """

    interventions: Mapping[str, Intervention]
    budget: Budget = field(default_factory=Budget)
    trials: Trials = field(default_factory=Trials)
    """Everything that was tried."""
    untreatable: dict[Key, str] = field(default_factory=dict)
    """Locations about which nothing more will be done, and advice to a person."""
    _advice: dict[Key, str] = field(default_factory=dict)

    def propose(
        self, open_issues: Sequence[StabilityIssue], run: TrainingRun
    ) -> Intervention | None:
        """Choose the next intervention, for every alarm that it is the next choice for.

        Alarms that are left without a choice are noted in ``untreatable``, once.

        Args:
            open_issues: every issue that is open now.
            run: the run.

        Returns:
            The intervention, with the alarms that it is for; None where nothing is to be done, or
            nothing is left.
        """
        alarms = alarms_now(open_issues, run)
        self._renew(alarms)
        self._note_untreated(open_issues)
        pending = self.trials.pending
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
        """Note an intervention that was applied, proposed here or by a person."""
        self.trials.add(applied)

    def note_refused(self, intervention: Intervention, error: NotApplicable) -> None:
        """Do not propose again, for these locations, an intervention that did not fit.

        A person's own with other settings does not count against the allowed one.

        Args:
            intervention: the intervention that was refused.
            error: the reason.
        """
        name = intervention.name
        if name in self.interventions and intervention != self.interventions[name]:
            return
        keys = keys_of(intervention.issues)
        self.trials.rule_out(name, keys)
        if error.advice:
            self._advice |= dict.fromkeys(keys, f"{error.reason}: {error.advice}")

    def judge(
        self, open_issues: Sequence[StabilityIssue], run: TrainingRun, *, release: bool = True
    ) -> list[Trial]:
        """Decide at a sample which interventions worked, see :meth:`Trials.judge`.

        Args:
            open_issues: every issue that is open now.
            run: the run.
            release: release interventions that are no longer needed.

        Returns:
            Trials whose intervention is to be taken back for their ``reason``.
        """
        open_keys = {key_of(issue, symptom) for issue, symptom in alarms_now(open_issues, run)}
        return self.trials.judge(open_keys, self.budget, run.step, release=release)

    def state_dict(self, applied: Sequence[Applied]) -> dict[str, Any]:
        """Return everything but the interventions' own states.

        Args:
            applied: every intervention applied so far; its order gives each its number.
        """
        untreatable = [[list(key), words] for key, words in self.untreatable.items()]
        return self.trials.state_dict(applied) | {"gave_up": untreatable}

    def parse_state(
        self, state: Mapping[str, Any] | Stored, kept: Sequence[bool]
    ) -> Callable[[Sequence[Applied]], None]:
        """Read a state whole, and return a function that restores it.

        Args:
            state: a value of :meth:`state_dict`.
            kept: for each stored intervention, whether it is known today; trials of the others are
                left out with them.

        Returns:
            A function that takes the interventions that are kept.

        Raises:
            ValueError: if it is no policy's state.
        """
        saved = Stored.of(state)
        restore_trials = self.trials.parse_state(saved, kept)
        untreatable = {stored_key(key): words.text() for key, words in pairs(saved["gave_up"])}

        def restore(applied: Sequence[Applied]) -> None:
            restore_trials(applied)
            self.untreatable = untreatable

        return restore

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
            if not name and key not in self.untreatable:
                advice = self._advice.get(key) or _own_advice(alarms, symptom) or symptom.advice
                self.untreatable[key] = f"{why}; {advice}"
        names = {name for name, _ in choices.values() if name}
        names -= {each for each in names if whole_run and self._affects_whole_run(each)}
        if not names:
            return None
        name = min(names, key=lambda each: (self._order(each, symptom.name), each))
        chosen = {key for key, (each, _) in choices.items() if each == name}
        return self._aim(name, [i for i in alarms if key_of(i, symptom) in chosen])

    def _due(self, alarms: Sequence[Alarm], run: TrainingRun) -> Intervention | None:
        """Return an intervention that is due at once, for the alarms that it is due for."""
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
        """Return the interventions applied for an issue since its cause was found."""
        since, key = _found_at(issue), key_of(issue, symptom)
        tried = [trial.applied for trial in self.trials.at(key)]
        return [applied for applied in tried if applied.step >= since]

    def _renew(self, alarms: Sequence[Alarm]) -> None:
        """Allow repeatable interventions for alarms whose cause was found again."""
        for issue, symptom in alarms:
            key = key_of(issue, symptom)
            if self.trials.renew(key, _found_at(issue)):
                self.untreatable.pop(key, None)

    def _note_untreated(self, open_issues: Sequence[StabilityIssue]) -> None:
        """Note alarms whose rule declares no symptom as untreatable."""
        for issue in without_symptom(open_issues):
            key = (issue.issue_type, issue.layer, issue.head)
            if key not in self.untreatable:
                self.untreatable[key] = (
                    f"the rule of {issue.issue_type} declares no symptom, so that no intervention "
                    f"treats it; {issue.suggestion}"
                )

    def _next(self, key: Key, run: TrainingRun) -> tuple[str, str]:
        """Return the name of the next intervention at a location, and why there is none."""
        if len(self.trials.entries) >= self.budget.max_interventions:
            return "", f"all {self.budget.max_interventions} interventions of the budget are spent"
        spent = len(self.trials.at(key))
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
        """Return whether an intervention may be tried at a location."""
        if len(self.trials.entries) >= self.budget.max_interventions:
            return False
        if len(self.trials.at(key)) >= self.budget.max_per_location:
            return False
        if name in self.trials.ruled_out.get(key, ()):
            return False
        intervention = self.interventions[name]
        return not intervention.unsuited(run, key[0]) and intervention.affordable(
            run, self.budget, self.trials.uses(name)
        )

    def _order(self, name: str, symptom: str) -> float:
        """Return the order of an intervention among those that treat a symptom."""
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
        ruled_out = (self.trials.ruled_out.get(key, ()) for key in keys_of(issues))
        before = sorted({name for names in ruled_out for name in names})
        return f"{kinds} at {where}" + (
            f"; {', '.join(before)} failed or did not fit" if before else ""
        )


def _found_at(issue: StabilityIssue) -> int:
    """Return the step at which an issue's cause was found; 0 where not known."""
    found = issue.evidence.get("found_at", 0)
    return int(found) if isinstance(found, (int, float)) else 0


def _own_advice(alarms: Sequence[StabilityIssue], symptom: Symptom) -> str:
    """Return the advice of an alarm of the whole run that knows its own cause."""
    advice = (issue.suggestion for issue in alarms if issue.evidence.get("cause"))
    return "" if symptom.per_location else next(advice, "")
