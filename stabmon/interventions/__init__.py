"""Interventions: acts that repair a training run, each ``apply`` with an ``undo``. One act, one
file.

``INTERVENTIONS`` finds them by name; :class:`~stabmon.interventions.run.training_run.TrainingRun`
is what they may touch; :class:`~stabmon.guard.guard.Guard` chooses, applies, judges and takes back.
"""

from stabmon._moved import moved_names
from stabmon.interventions.base import INTERVENTIONS, Applied, Intervention, intervention
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable

__all__ = [
    "INTERVENTIONS",
    "Applied",
    "Intervention",
    "NotApplicable",
    "TrainingRun",
    "intervention",
]

__getattr__ = moved_names(__name__, "guard", "projections.not_applicable")
