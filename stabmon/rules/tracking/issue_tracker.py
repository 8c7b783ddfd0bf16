"""Life of issues: from what holds now to what opened, worsened and closed."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Container, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from stabmon._storage.stored_value import Stored
from stabmon.records import SEVERITIES, Reading, StabilityIssue
from stabmon.rules.base import RULES, Rule, rule_name, rule_of, worsened
from stabmon.rules.evidence.own_past import own_past
from stabmon.rules.tracking.history import History

Key = tuple[str, str | None, int | None]
Found = dict[Key, tuple[StabilityIssue, str]]
"""Worst issue of each place at a reading, with the name of its rule."""


class Judge(Protocol):
    """Decides which of the rules' issues are alarms."""

    def judge(self, history: History, found: Found) -> tuple[dict[str, float], Found]:
        """Return the risk of each layer, and the issues as they are to be reported."""
        ...


@dataclass(frozen=True)
class _Open:
    """An issue that was emitted and has not closed."""

    issue: StabilityIssue
    """The issue as last emitted, so at its worst."""
    rule: str
    """Config name of the rule that found it."""
    since: int
    """Step at which it opened."""
    absent: int = 0
    """Samples in a row at which its rule no longer found it."""


@dataclass(frozen=True)
class _Closed:
    """An issue that has closed, within its cooldown."""

    issue: StabilityIssue
    """The issue at its worst."""
    step: int
    """Step at which it closed."""


class IssueTracker:
    """Runner of rules that emits issues as they open, worsen and close.

    One place (type, layer, head) has at most one open issue. It worsens when its severity rises or
    its value goes far further (see :func:`~stabmon.rules.base.worsened`). It closes, as ``info``,
    after ``clear_after`` readings in a row that measured the place and did not find it anomalous; a
    reading without values for the head counts neither way. What closed does not open again within
    ``cooldown_steps``, unless it comes back worse than it ever was, is critical, or rests on
    something newly found, as a NaN does after finite losses. Nothing is kept quiet for what came
    before an intervention ended, see :meth:`end_cooldowns`.

    Issues of one reading come most severe first; each carries in ``evidence["heads_alike"]`` the
    number of heads of its layer found with the same type at that reading, so that a view can fold a
    layer that became unstable as a whole into one line.

    Args:
        rules: what to run, in this order.
        history: the readings so far; the tracker adds each new one.
        clear_after: readings without the issue before it closes.
        cooldown_steps: optimizer steps.
        on_error: called with the first exception of each rule; a rule that raises is skipped for
            that reading only, and its open issues stay open.
        judge: decides which issues are alarms; None to leave that to the rules.

    Raises:
        ValueError: if ``clear_after`` is below 1 or ``cooldown_steps`` below 0.

    Example:
        >>> from stabmon.rules.non_finite import NonFinite
        >>> tracker = IssueTracker([NonFinite()], history=History(), cooldown_steps=10)
        >>> losses = [2.0, float("nan"), 2.0, 2.0]
        >>> emitted = [tracker.update(Reading(at, loss, {})) for at, loss in enumerate(losses)]
        >>> [[issue.state for issue in issues] for issues in emitted]
        [[], ['opened'], [], ['closed']]
    """

    def __init__(
        self,
        rules: Sequence[Rule],
        *,
        history: History,
        clear_after: int = 2,
        cooldown_steps: int,
        on_error: Callable[[Exception], None] | None = None,
        judge: Judge | None = None,
    ) -> None:
        if clear_after < 1 or cooldown_steps < 0:
            raise ValueError(
                f"clear_after {clear_after} and cooldown_steps {cooldown_steps}: use at least 1 "
                "and 0"
            )
        self.rules = tuple(rules)
        self._names = tuple(rule_name(type(rule)) for rule in self.rules)
        self.history = history
        self.clear_after = clear_after
        self.cooldown_steps = cooldown_steps
        self._on_error = on_error
        self._judge = judge
        self.risks: dict[str, float] = {}
        """Risk of each layer at the newest reading, in [0, 1]; empty without a judge."""
        self._reported: set[str] = set()
        self._open: dict[Key, _Open] = {}
        self._closed: dict[Key, _Closed] = {}

    @property
    def open_issues(self) -> tuple[StabilityIssue, ...]:
        """Every open issue as it was last emitted, most severe and causes first."""
        return tuple(_in_order(entry.issue for entry in self._open.values()))

    def update(self, reading: Reading) -> list[StabilityIssue]:
        """Add a reading to the history and run every rule.

        Returns:
            Only what opened, worsened or closed, most severe and causes first.
        """
        self.history.add(reading)
        self._closed = {
            k: c for k, c in self._closed.items() if reading.step - c.step < self.cooldown_steps
        }
        found, ran = self._run_rules()
        found = self._judged(found, reading)
        emitted = self._close(found, ran, reading.step)
        alike = Counter(key[:2] for key in found)
        for key, (issue, name) in found.items():
            emitted += self._open_or_worsen(key, issue, name, alike[key[:2]])
        self._update_open_levels()
        self.history.drop_copies()
        return _in_order(emitted)

    def end_cooldowns(self) -> None:
        """Let every alarm that has closed open again at once.

        To be called when an intervention ends, or the run goes back to an earlier state: an alarm
        may have closed by the intervention alone, or have been of the course that was left.
        """
        self._closed = {k: c for k, c in self._closed.items() if not c.issue.is_alarm}

    def state_dict(self) -> dict[str, Any]:
        """Return history, open issues and cooldowns as plain values.

        For JSON (with NaN) or ``torch.save``.
        """
        return {
            "history": self.history.state_dict(),
            "open": [_plain(entry) for entry in self._open.values()],
            "closed": [_plain(entry) for entry in self._closed.values()],
        }

    def load_state_dict(
        self, state: Mapping[str, Any] | Stored, signals: Container[str] | None = None
    ) -> None:
        """Continue exactly from a state of :meth:`state_dict`.

        Without the open issues of rules that are not known any more.

        Args:
            state: a value of :meth:`state_dict`.
            signals: names of the signals that exist today, others are left out; None to take all.

        Raises:
            ValueError: if it is no tracker's state; the tracker is then as it was.
        """
        saved = Stored.of(state)
        opened = [
            _Open(
                StabilityIssue.from_dict(each["issue"]),
                each["rule"].text(),
                each["since"].integer(),
                each["absent"].integer(),
            )
            for each in saved["open"].parts()
            if self._is_known(each["rule"])
        ]
        closed = [
            _Closed(StabilityIssue.from_dict(each["issue"]), each["step"].integer())
            for each in saved["closed"].parts()
        ]
        self.history.load_state_dict(saved["history"], signals)
        self._open = {entry.issue.key: entry for entry in opened}
        self._closed = {entry.issue.key: entry for entry in closed}
        self._update_open_levels()

    def _is_known(self, rule: Stored) -> bool:
        """Return whether a rule of this name exists; leave out its issue where none does."""
        known = rule.text() in self._names or rule.text() in RULES
        if not known:
            rule.leave_out(f"there is no rule {rule.value!r} any more; its open issue is dropped")
        return known

    def _update_open_levels(self) -> None:
        self.history.set_open((entry.issue, entry.since) for entry in self._open.values())

    def _judged(self, found: Found, reading: Reading) -> Found:
        if self._judge is None or not reading.layers:
            return found
        try:
            self.risks, found = self._judge.judge(self.history, found)
        except Exception as error:
            self._report("risk", error)
        return found

    def _run_rules(self) -> tuple[Found, set[str]]:
        """Return the worst issue of each place with its rule, and the rules that ran."""
        found: Found = {}
        ran: set[str] = set()
        for rule, name in zip(self.rules, self._names, strict=True):
            try:
                issues = list(rule.check(self.history))
            except Exception as error:  # a rule may fail in any way, and the others must go on
                self._report(name, error)
                continue
            ran.add(name)
            for issue in issues:
                if issue.key not in found or _rank(issue) > _rank(found[issue.key][0]):
                    found[issue.key] = (issue, name)
        return found, ran

    def _close(self, found: Mapping[Key, Any], ran: set[str], step: int) -> list[StabilityIssue]:
        """Return the issues that close: measured, and not found often enough in a row."""
        emitted = []
        for key, entry in list(self._open.items()):
            failed = entry.rule in self._names and entry.rule not in ran
            if key in found or failed or not self.history.seen(key[1], key[2]):
                continue
            absent = entry.absent + 1
            if absent < self.clear_after:
                self._open[key] = replace(entry, absent=absent)
                continue
            del self._open[key]
            self._closed[key] = _Closed(entry.issue, step)
            emitted.append(self._as_closed(entry, step))
        return emitted

    def _as_closed(self, entry: _Open, step: int) -> StabilityIssue:
        """Return the issue with the value at which it closed, as far as its rule knows it."""
        issue, now = entry.issue, None
        rule = rule_of(issue.issue_type)
        try:
            if rule is not None and hasattr(rule, "value_now"):
                now = rule.value_now(issue, self.history)
        except Exception as error:
            self._report(entry.rule, error)
        evidence = {**issue.evidence, "worst_value": issue.value, "opened_at": entry.since}
        return replace(
            issue,
            step=step,
            severity="info",
            state="closed",
            eta_steps=None,
            value=issue.value if now is None else now,
            evidence=evidence,
        )

    def _open_or_worsen(
        self, key: Key, issue: StabilityIssue, name: str, alike: int
    ) -> list[StabilityIssue]:
        """Return what is to be emitted of an issue that holds."""
        entry, closed = self._open.get(key), self._closed.get(key)
        if entry is not None and _rank(issue) < _rank(entry.issue):
            # an open issue may worsen or close, never soften
            issue = replace(issue, severity=entry.issue.severity)
        if entry is not None and not worsened(issue, entry.issue):
            self._open[key] = replace(entry, absent=0) if entry.absent else entry
            return []
        if entry is None and closed is not None and self._is_quiet(issue, closed.issue):
            return []
        evidence = {
            **self._own_past(issue, name),
            **issue.evidence,
            **({} if issue.head is None else {"heads_alike": alike}),
        }
        issue = replace(issue, state="opened" if entry is None else "worsened", evidence=evidence)
        self._open[key] = _Open(issue, name, issue.step if entry is None else entry.since)
        return [issue]

    @staticmethod
    def _is_quiet(issue: StabilityIssue, closed: StabilityIssue) -> bool:
        """Return whether the cooldown of a closed issue covers its return."""
        return issue.severity != "critical" and not worsened(issue, closed)

    def _own_past(self, issue: StabilityIssue, name: str) -> dict[str, float]:
        """Return the past of the issue's value, where it is that of a signal."""
        signal = getattr(rule_of(issue.issue_type), "value_of", None)
        try:
            return {} if signal is None else own_past(self.history, issue, signal)
        except Exception as error:  # an issue of another package may name no place that exists
            self._report(name, error)
            return {}

    def _report(self, name: str, error: Exception) -> None:
        if name in self._reported or self._on_error is None:
            return
        self._reported.add(name)
        error.add_note(f"raised by the rule {name!r}, which is skipped at readings where it raises")
        self._on_error(error)


def _plain(entry: _Open | _Closed) -> dict[str, Any]:
    return vars(entry) | {"issue": entry.issue.to_dict()}


def _rank(issue: StabilityIssue) -> int:
    return SEVERITIES.index(issue.severity)


def _in_order(issues: Any) -> list[StabilityIssue]:
    """Return the most severe first, of these the causes, and a layer before its heads."""
    return sorted(
        issues,
        key=lambda i: (
            -_rank(i),
            not _explains(i),
            i.issue_type,
            i.layer or "",
            -1 if i.head is None else i.head,
        ),
    )


def _explains(issue: StabilityIssue) -> bool:
    """Return True if an issue explains others of the same step."""
    found = rule_of(issue.issue_type)
    return bool(getattr(found, "explains_others", False))
