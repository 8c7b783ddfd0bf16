"""Decide which optimizer steps are sampled, within a share of the run's time."""
