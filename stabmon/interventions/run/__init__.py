"""Give interventions access to a training run."""

from stabmon._moved import moved_names

__getattr__ = moved_names(__name__, "interventions.run.training_run")
