"""Interventions: acts that repair a training run, each ``apply`` with an ``undo``. One act, one file.

``INTERVENTIONS`` finds them by name; :class:`~stabmon.interventions.run.TrainingRun` is what they may touch;
:class:`~stabmon.interventions.guard.Guard` chooses, applies, judges and takes back.
"""

from stabmon.interventions.base import INTERVENTIONS, Applied, CannotApply, Intervention, intervention
from stabmon.interventions.choose import Budget
from stabmon.interventions.guard import Guard, make_interventions
from stabmon.interventions.run import TrainingRun

__all__ = [
    "INTERVENTIONS",
    "Applied",
    "Budget",
    "CannotApply",
    "Guard",
    "Intervention",
    "TrainingRun",
    "intervention",
    "make_interventions",
]
