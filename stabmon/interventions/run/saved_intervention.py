"""Read a stored intervention whole, then apply it again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabmon._settings import Layer, read, renamed_settings, setting_names
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import INTERVENTIONS, Applied, Intervention
from stabmon.interventions.effects.elsewhere import NOTE, Elsewhere
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import StabilityIssue

logger = logging.getLogger("stabmon")


@dataclass(frozen=True)
class SavedIntervention:
    """A checked value of :meth:`~stabmon.interventions.base.applied.Applied.state_dict`."""

    intervention: Intervention
    state: Mapping[str, Any]
    active: bool
    by_user: bool
    for_one_step: bool

    @classmethod
    def parse(cls, saved: Stored) -> SavedIntervention | None:
        """Read a stored intervention; settings that are no longer known are left out.

        Returns:
            None, with the intervention left out, where its name is no longer known.

        Raises:
            ValueError: if it is no stored intervention, naming the place.
        """
        name, settings = saved["intervention"].text(), dict(saved["settings"].mapping())
        active, effect = saved["active"].flag(), saved["effect"]
        issues = [StabilityIssue.from_dict(each) for each in saved["issues"].parts()]
        state = {
            "step": saved["step"].integer(),
            "record": saved["record"].mapping(),
            "effect": effect.mapping(),
        }
        why = saved["why"].text()
        by_user, for_one_step = (
            saved.get(each, False).flag() for each in ("by_hand", "for_one_step")
        )
        if name not in INTERVENTIONS:
            saved.leave_out(f"no intervention {name!r} is known any more")
            return None
        kind = INTERVENTIONS[name]
        for each in settings.keys() - set(setting_names(kind)) - renamed_settings(kind).keys():
            saved["settings"][each].leave_out(f"{name} has no such setting any more")
            del settings[each]
        layer = Layer(settings, f"{saved.where}.settings")
        intervention = read(kind, layer).aimed_at(issues, why)
        if active and not Elsewhere.is_state(effect.mapping()):
            intervention.check_saved(effect)
        return cls(intervention, state, active, by_user, for_one_step)

    def restore(self, run: TrainingRun) -> None:
        """Apply it again; where it is over or no longer fits, count it among those tried.

        It does not raise.
        """
        applied = None
        try:
            if self.active and Elsewhere.is_state(self.state["effect"]):
                effect, record = Elsewhere(note=NOTE), self.state["record"]
                step = int(self.state["step"])
                applied = Applied(self.intervention, run, effect, step=step, record=record)
            elif self.active:
                applied = self.intervention.resume(run, self.state)
        except NotApplicable as error:
            logger.warning("%s is not held any longer: %s", self.intervention.name, error.reason)
        except Exception as error:
            logger.error(
                "%s failed and is not held any longer: %s",
                self.intervention.name,
                error,
                exc_info=error,
            )
        applied = applied or self.intervention.ended(run, self.state)
        applied.by_user = self.by_user
        if applied.active and self.for_one_step:
            applied.hold_for_one_step()
