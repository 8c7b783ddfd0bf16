"""Rules: from the readings of a run to the issues that hold now.

A rule is one file that judges one failure mode. To add one, write a frozen dataclass that inherits
from :class:`Rule`, whose fields are its levels, whose ``symptom`` names the failure mode and whose
``check`` yields a :class:`~stabmon.records.StabilityIssue` for each head that is anomalous at the
newest reading; :class:`Rule` shows a complete one. Then register it, in either of two ways:

- in this package, decorate the class with :func:`rule`; every module of the folder is imported when
  a rule is first looked up, so that no list has to be kept;
- in a package of your own, name the class in an entry point of the group ``stabmon.rules``:
  ``uniform_attention = "my_package:UniformAttention"``.

Its config name is the class name in snake case (or that of the entry point), and ``rules:
{uniform_attention: {above: 0.98}}`` sets a level. Its issues open, worsen and close like all
others, are written by every sink, and are treated by the interventions that declare its symptom.

``RULES`` finds rules by name, :class:`History` holds the readings as arrays, and
:class:`~stabmon.rules.tracking.issue_tracker.IssueTracker` turns "holds now" into opened, worsened
and closed.
"""

from stabmon.rules.base import RULES, Rule, rule
from stabmon.rules.tracking.history import History

__all__ = ["RULES", "History", "Rule", "rule"]
