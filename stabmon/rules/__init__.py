"""Rules: a history of readings -> the issues that hold now. One disease, one file.

``RULES`` finds them by name; :class:`~stabmon.rules.tracking.history.History` is what they look at;
:class:`~stabmon.rules.tracking.issue_tracker.IssueTracker` turns "holds now" into opened, worsened
and closed.
"""

from stabmon.rules.base import RULES, Rule, rule
from stabmon.rules.tracking.history import History

__all__ = ["RULES", "History", "Rule", "rule"]
