"""Propose the next intervention, and report once where none is left."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from stabmon.guard.audit import write_not_made
from stabmon.guard.policy import Policy
from stabmon.guard.symptoms import Key
from stabmon.interventions.base import Intervention
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.records import StabilityIssue

logger = logging.getLogger("stabmon")


class Proposals:
    """The policy's choices, and the report of locations that it has given up.

    Args:
        run: the run.
        policy: chooses.
    """

    def __init__(self, run: TrainingRun, policy: Policy) -> None:
        self.run, self.policy = run, policy
        self.reported: set[Key] = set()
        """Locations that were reported as untreatable."""

    def propose(self, open_issues: Sequence[StabilityIssue]) -> Intervention | None:
        """Propose an intervention for the open alarms.

        Locations for which none is left are logged and audited once.

        Args:
            open_issues: every issue that is open now.

        Returns:
            The intervention, with the alarms that it is for; None where nothing is to be done.
        """
        proposed = self.policy.propose(open_issues, self.run)
        news: dict[str, list[Key]] = {}
        for key, words in self.policy.untreatable.items():
            if key not in self.reported:
                self.reported.add(key)
                news.setdefault(words, []).append(key)
        for words, keys in news.items():
            layer, head = keys[0][1:] if len(keys) == 1 else (None, None)
            logger.warning("No intervention is left for %d places: %s", len(keys), words)
            places = [list(key[1:]) for key in keys]
            write_not_made(self.run, "gave_up", None, layer, head, places=places, why=words)
        return proposed
