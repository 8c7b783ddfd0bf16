"""Record of an incident: issues of one step that have one cause, in words."""

from __future__ import annotations

from dataclasses import dataclass

from stabmon._display.html import card, code, line
from stabmon._storage.plain_record import PlainRecord
from stabmon.records import IssueState, Severity, StabilityIssue
from stabmon.rules.wording.description import RUN


@dataclass(frozen=True)
class Incident(PlainRecord):
    """One change of an incident, as every view shows it.

    Example:
        >>> from stabmon.incidents import incidents_of
        >>> issue = StabilityIssue(
        ...     40, "h.0", 2, "logit_growth", "error", 90.0, 48.0, "Clip this head.",
        ...     {"how": "jump", "value_before": 12.0, "step_before": 30})
        >>> incident, = incidents_of([issue])
        >>> incident.text()
        'attention scores jumped in h.0 head 2: largest score 90, was 12 at step 30.'
    """

    number: int
    """Number in the run, from 1; the same for every change of the incident."""
    step: int
    """Optimizer step of this change."""
    first_step: int
    """Optimizer step at which the incident opened."""
    cause: str
    """Type of the issues that explain the others."""
    state: IssueState
    severity: Severity
    """The worst of its open issues; ``info`` once closed."""
    title: str
    """The finding as a clause, without step and location."""
    where: str
    """Location of the cause: the run, a layer and its heads, or layers counted."""
    numbers: str
    """Named quantities, each with its past."""
    effects: str
    """Issues that follow from the cause, counted; empty for none."""
    forecast: str
    """Time until damage; empty where none is forecast."""
    advice: str
    """Advice to the user, in the terms of the framework."""
    code: str
    """Lines of code that do it, ready to copy; empty where there is none."""
    layers: tuple[str, ...]
    """Layers affected so far."""
    heads: int
    """Number of heads affected so far."""
    issues: tuple[StabilityIssue, ...]
    """The issues of this step, the worst first."""
    announced: bool
    """Worth a line in a terminal; otherwise it repeats what was said, or is no alarm."""
    alerts: bool
    """Worth an alert."""
    advises: bool
    """The advice is new: it has not been given with an earlier change."""
    alarmed: bool
    """An issue of severity error or above was open at some time."""

    @property
    def is_alarm(self) -> bool:
        """True while an issue of severity error or above is open."""
        return self.severity in ("error", "critical")

    @property
    def headline(self) -> str:
        """Title and location in one clause."""
        return self.title if self.where == RUN else f"{self.title} in {self.where}"

    def __repr__(self) -> str:
        state = f"{self.state} at step {self.step}"
        return f"Incident({self.number}: {self.severity}, {self.headline}, {state})"

    def _repr_html_(self) -> str:
        """Return the finding, its numbers, and what to do, for notebooks."""
        return card(
            f"{self.severity}: {self.headline}",
            line(f"{self.state} at step {self.step}, since step {self.first_step}"),
            line(self.numbers),
            line(self.effects),
            line(self.forecast),
            line(f"To do: {self.advice}" if self.advice else ""),
            code(self.code),
            severity=self.severity,
        )

    def text(self) -> str:
        """Return the change as one paragraph, without the advice.

        Returns:
            Title, location, numbers, effects and forecast, in sentences.
        """
        more = "".join(f" {part}." for part in (self.effects, self.forecast) if part)
        return f"{self.headline}: {self.numbers}.{more}"
