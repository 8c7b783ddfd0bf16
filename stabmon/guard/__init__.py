"""Choose, apply, judge and take back interventions on a run."""

from stabmon.guard.guard import Guard, make_interventions
from stabmon.interventions.run.budget import Budget

__all__ = ["Budget", "Guard", "make_interventions"]
