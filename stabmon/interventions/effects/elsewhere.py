"""Stand for an effect on layers that only other pipeline stages hold."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from stabmon.interventions.effects.effect import Effect

NOTE = "carried out by the stage that holds these layers"


class Elsewhere(Effect):
    """No change here, of an intervention that other ranks carry out.

    All ranks count the same interventions, so that rank 0 can have each taken back on all.

    Example:
        >>> Elsewhere(places=[("stage1.attn", 3)], note=NOTE).state_dict()
        {'elsewhere': True}
    """

    def state_dict(self) -> dict[str, Any]:
        return {"elsewhere": True}

    @staticmethod
    def is_state(effect: Mapping[str, Any]) -> bool:
        """Return whether a stored effect is one of these."""
        return effect.get("elsewhere") is True
