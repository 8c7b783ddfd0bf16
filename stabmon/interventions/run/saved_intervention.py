"""An act as a stored state has it: read whole before anything is changed, then applied again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from stabmon._settings import Layer, read, renamed_settings, setting_names
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import INTERVENTIONS, Intervention
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import StabilityIssue

logger = logging.getLogger("stabmon")


@dataclass(frozen=True)
class SavedAct:
    """What :meth:`~stabmon.interventions.base.Applied.state_dict` gave, as it can be taken up."""

    act: Intervention
    state: Mapping[str, Any]
    active: bool
    by_hand: bool
    for_one_step: bool

    @classmethod
    def parse(cls, saved: Stored) -> SavedAct | None:
        """Read one act. None, and left out, where no intervention of its name is known any more; so
        is a setting that is not.

        Raises:
            ValueError: if it is no act's state, naming the place.
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
        by_hand, for_one_step = (
            saved.get(each, False).flag() for each in ("by_hand", "for_one_step")
        )
        if name not in INTERVENTIONS:
            saved.leave_out(f"no intervention {name!r} is known any more")
            return None
        kind = INTERVENTIONS[name]
        for each in settings.keys() - set(setting_names(kind)) - renamed_settings(kind).keys():
            saved["settings"][each].leave_out(f"{name} has no such setting any more")
            del settings[each]
        act = read(kind, Layer(settings, f"{saved.where}.settings")).aimed_at(issues, why)
        if active:
            act.check_saved(effect)
        return cls(act, state, active, by_hand, for_one_step)

    def take_up(self, run: TrainingRun) -> None:
        """Apply it again; where it no longer fits, or was over, it only counts among what was
        tried. Does not raise.
        """
        applied = None
        try:
            applied = self.act.resume(run, self.state) if self.active else None
        except NotApplicable as error:
            logger.warning("%s is not held any longer: %s", self.act.name, error.reason)
        except Exception as error:
            logger.error(
                "%s failed and is not held any longer: %s", self.act.name, error, exc_info=error
            )
        applied = applied or self.act.ended(run, self.state)
        applied.by_hand = self.by_hand
        if applied.active and self.for_one_step:
            applied.hold_for_one_step()
