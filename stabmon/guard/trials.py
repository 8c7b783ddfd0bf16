"""Remember the interventions tried, and judge them by the alarms still open."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Sequence, Set
from dataclasses import dataclass, field
from typing import Any, Literal, cast, get_args

from stabmon._storage.stored_value import Stored
from stabmon.guard.symptoms import RENAMED, Key, keys_of
from stabmon.interventions.base import Applied
from stabmon.interventions.run.budget import Budget

logger = logging.getLogger("stabmon")

LEAST_STEPS = 5
"""Steps within which samples count as one.

An adaptive schedule reads each step while something moves, but an optimizer's moments need some 20
steps (four such samples) to follow what was changed.
"""
Outcome = Literal["pending", "worked", "failed"]


@dataclass(eq=False)
class Trial:
    """An intervention that was applied, and its outcome."""

    applied: Applied
    keys: tuple[Key, ...]
    since: int
    """The sample at which it was applied, or the last at which an alarm of its keys was open."""
    outcome: Outcome = "pending"
    closed: bool = False
    """No alarm of its keys was open at some sample since."""
    reason: str = ""
    """The reason to take it back; empty where there is none."""

    @property
    def name(self) -> str:
        """The intervention's name."""
        return self.applied.intervention.name


@dataclass(eq=False)
class Trials:
    """Every intervention tried in a run, and the locations where it failed."""

    entries: list[Trial] = field(default_factory=list)
    samples: int = 0
    """Number of sampled steps judged so far, of which one counts each ``LEAST_STEPS``."""
    counted_at: int | None = None
    """Step of the newest of them."""
    ruled_out: dict[Key, set[str]] = field(default_factory=dict)
    """Names of interventions that are not tried again, by location."""

    @property
    def pending(self) -> list[Trial]:
        """The trials that have no outcome yet."""
        return [trial for trial in self.entries if trial.outcome == "pending"]

    def add(self, applied: Applied) -> None:
        """Add an intervention that was applied just now."""
        self.entries.append(Trial(applied, keys_of(applied.intervention.issues), self.samples))

    def rule_out(self, name: str, keys: Collection[Key]) -> None:
        """Do not try an intervention again at some locations."""
        for key in keys:
            self.ruled_out.setdefault(key, set()).add(name)

    def at(self, key: Key) -> list[Trial]:
        """Return the trials at a location."""
        return [trial for trial in self.entries if key in trial.keys]

    def uses(self, name: str) -> int:
        """Return how often an intervention was applied."""
        return sum(trial.name == name for trial in self.entries)

    def renew(self, key: Key, since: int) -> bool:
        """Allow repeatable interventions at a location whose cause was found anew.

        Args:
            key: the location.
            since: the step at which its cause was found; older trials do not count any more.

        Returns:
            Whether any trial was dropped.
        """
        old = [
            trial
            for trial in self.at(key)
            if trial.applied.step < since and trial.applied.intervention.renews
        ]
        for trial in old:
            trial.keys = tuple(each for each in trial.keys if each != key)
            self.ruled_out.get(key, set()).discard(trial.name)
        return bool(old)

    def judge(
        self, open_keys: Set[Key], budget: Budget, step: int, *, release: bool
    ) -> list[Trial]:
        """Decide which interventions worked; a person's own are left as they are.

        One that is done at once has worked as soon as its alarm, closed meanwhile, opens again: that
        is a new fault, which must not wait.

        Args:
            open_keys: locations with an open alarm.
            budget: the number of samples to wait.
            step: the run's step.
            release: release those that are no longer needed, or loosen them.

        Returns:
            Trials whose intervention is to be taken back for their ``reason``: its effect says that
            it failed, or it failed and costs a healthy run something.
        """
        if self.counted_at is None or not 0 <= step - self.counted_at < LEAST_STEPS:
            self.samples, self.counted_at = self.samples + 1, step
        failed = []
        for trial in self.entries:
            age, ours = self.samples - trial.since, not trial.applied.by_user
            if self._is_abandoned(trial) and ours:
                failed.append(trial)
            is_open = not open_keys.isdisjoint(trial.keys)
            if trial.outcome == "pending":
                if is_open and trial.closed and age and trial.applied.intervention.once:
                    trial.outcome, trial.since = "worked", self.samples
                elif age >= budget.patience:
                    self._decide(trial, open_keys)
                    if self._is_costly_failure(trial):
                        trial.reason = (
                            f"its alarm is still open after {age} samples, and it may raise the "
                            "loss of a healthy run"
                        )
                        failed.append(trial)
                    trial.since = self.samples
                trial.closed |= not is_open
            elif is_open:
                trial.since = self.samples
            elif release and ours and trial.applied.active and age >= budget.release_after:
                self.loosen(trial.applied, age, trial.applied.effect.was_active())
        return failed

    def state_dict(self, applied: Sequence[Applied]) -> dict[str, Any]:
        """Return the trials as plain values, numbered by their place in ``applied``."""
        return {
            "samples": self.samples,
            "counted_at": self.counted_at,
            "trials": [
                [applied.index(t.applied), [list(k) for k in t.keys], t.since, t.outcome]
                for t in self.entries
            ],
            "ruled_out": [[list(key), sorted(names)] for key, names in self.ruled_out.items()],
        }

    def parse_state(
        self, saved: Stored, kept: Sequence[bool]
    ) -> Callable[[Sequence[Applied]], None]:
        """Read a state whole, and return a function that restores it.

        Args:
            saved: a value of :meth:`state_dict`.
            kept: for each stored intervention, whether it is known today; trials of the others are
                left out with them.

        Returns:
            A function that takes the interventions that are kept.

        Raises:
            ValueError: if it is no state of trials.
        """
        number = {at: sum(kept[:at]) for at, known in enumerate(kept) if known}
        samples = saved["samples"].integer()
        counted_at = saved.get("counted_at", None).maybe(Stored.integer)
        trials: list[tuple[int, tuple[Key, ...], int, Outcome]] = []
        for each in saved["trials"].parts():
            at, keys, since, outcome = each.parts(4)
            if at.integer() >= len(kept):
                raise ValueError(
                    f"{at.where} is {at.value}, but there are {len(kept)} interventions"
                )
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
            for key, names in pairs(saved["ruled_out"])
        }

        def restore(applied: Sequence[Applied]) -> None:
            self.samples, self.counted_at, self.ruled_out = samples, counted_at, ruled_out
            self.entries = [
                Trial(applied[at], keys, since, outcome) for at, keys, since, outcome in trials
            ]

        return restore

    def _is_abandoned(self, trial: Trial) -> bool:
        """Note a trial whose effect says that it failed; return whether it is new."""
        why = trial.applied.effect.explain_failure()
        if not (trial.applied.active and why) or trial.reason:
            return False
        self.rule_out(trial.name, trial.keys)
        trial.outcome, trial.reason = "failed", why
        if trial.applied.by_user:
            logger.warning("%s does not help: %s; undo it", trial.name, why)
        return True

    def _decide(self, trial: Trial, open_keys: Set[Key]) -> None:
        still = [key for key in trial.keys if key in open_keys]
        self.rule_out(trial.name, still)
        trial.outcome = "failed" if still and len(still) == len(trial.keys) else "worked"

    def _is_costly_failure(self, trial: Trial) -> bool:
        applied = trial.applied
        failed = trial.outcome == "failed" and not applied.by_user
        return failed and applied.active and applied.intervention.cost > 0

    def loosen(self, applied: Applied, age: int, was_active: bool) -> None:
        """Loosen an intervention that still had something to do; release it if not.

        Args:
            applied: the intervention.
            age: samples since an alarm of its keys was open.
            was_active: it had something to do since it was last asked.
        """
        if not was_active:
            applied.release(f"no alarm for {age} samples, in which it had nothing to do")
            return
        for trial in self.entries:
            if trial.applied is applied:
                trial.since = self.samples
        applied.relax()

    def idle(self, open_keys: Set[Key], budget: Budget) -> list[tuple[Trial, int]]:
        """Return the trials to loosen, and the samples since an alarm of theirs was open.

        Args:
            open_keys: locations with an open alarm.
            budget: the number of samples to wait.
        """
        ages = [(trial, self.samples - trial.since) for trial in self.entries]
        return [
            (trial, age)
            for trial, age in ages
            if trial.outcome != "pending"
            and not trial.applied.by_user
            and trial.applied.active
            and open_keys.isdisjoint(trial.keys)
            and age >= budget.release_after
        ]


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


def pairs(saved: Stored) -> list[tuple[Stored, Stored]]:
    """Read a list of pairs.

    Raises:
        ValueError: if it is none.
    """
    return [(first, second) for first, second in (each.parts(2) for each in saved.parts())]
