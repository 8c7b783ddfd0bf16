"""Give interventions access to a training run."""
