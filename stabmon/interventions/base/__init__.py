"""Interventions in general: what one declares, does to a run, and leaves as a record."""

from stabmon.interventions.base.applied import Applied
from stabmon.interventions.base.declaration import ATTENTION_AND_LOSS
from stabmon.interventions.base.intervention import INTERVENTIONS, Intervention, intervention

__all__ = ["ATTENTION_AND_LOSS", "INTERVENTIONS", "Applied", "Intervention", "intervention"]
