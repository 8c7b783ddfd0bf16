"""Limits of what may be done to one run."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Budget:
    """Limits of what may be done to one run. Samples are sampled optimizer steps.

    Example:
        >>> Budget(max_rollbacks=0).max_interventions
        20
    """

    max_interventions: int = 20
    """Interventions in a run."""
    max_per_location: int = 3
    """Interventions on one head, or on the run as a whole for one kind of issue."""
    max_rollbacks: int = 3
    """Rollbacks in a run."""
    min_lr_scale: float = 0.05
    """Lowest share of the scheduled learning rate that interventions may leave."""
    patience: int = 4
    """Samples after which an intervention is judged by whether its alarm is still open."""
    release_after: int = 20
    """Samples without an alarm after which an intervention that is held is ended, if it had nothing
    to do in them, and loosened if it had.
    """
