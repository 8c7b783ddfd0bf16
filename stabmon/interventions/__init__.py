"""Changes that repair a training run and can be undone, one intervention a file.

``INTERVENTIONS`` finds them by name.
:class:`~stabmon.interventions.run.training_run.TrainingRun` holds the parts of a run that they may
change. :class:`~stabmon.guard.guard.Guard` chooses, applies, judges and undoes them.
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
