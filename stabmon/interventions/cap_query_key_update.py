"""A ceiling on the change of W_q and W_k that one optimizer step may make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np

from stabmon._settings import Factor
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.effects.update_cap import UpdateCap
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable

PAST = 20
"""Number of newest readings whose median is the usual change of a step."""


@intervention
@dataclass(frozen=True)
class CapQueryKeyUpdate(Intervention):
    r"""Hold each step's change of W_q and W_k in bounds.

    After every optimizer step the change :math:`\Delta W` is scaled by
    :math:`\min(1, c\,\|W\| / \|\Delta W\|)`, as long as this is held. W is everything that makes
    the layer's queries and keys; under adapters it is the effective weight. c is ``times`` the
    usual share :math:`\|\Delta W\| / \|W\|` of the layer's steps, the median of the readings
    before, and follows the schedule from there: the median over all parameter groups of rate over
    usual rate, so that the jump of one group does not lift it.

    It repairs a rate that is wrong for queries and keys alone, whatever its cause and size, and
    changes nothing else. Scores that have grown already stay as they are: clip them. It costs a
    copy of W_q and W_k from before each step to after it.

    Example:
        >>> CapQueryKeyUpdate(share=0.01).settings
        {'times': 1.25, 'share': 0.01}

    References:
        Anson & Aitchison 2025, arXiv:2511.21377: rates for queries and keys in proportion to
        1 / ||W||.
        Shazeer & Stern 2018, arXiv:1804.04235 (Adafactor): clipping of updates.
    """

    treats: ClassVar[Mapping[str, int]] = {"step": 10}

    times: Factor = 1.25
    """Ceiling of a step's share, as a multiple of the layer's usual share.

    Where the rate is wrong every step reaches the ceiling, so that it must be near 1.
    """
    share: Factor | None = None
    """The ceiling c itself, whatever the rate; None to take ``times`` the layer's usual share."""

    def _start(self, run: TrainingRun) -> Effect:
        named = [issue.layer for issue in self.issues if issue.layer is not None]
        usual = {issue.layer: issue.evidence.get("usual_query_key_update") for issue in self.issues}
        caps: dict[str, float] = {}
        for layer in dict.fromkeys(named or run.known_layers()):
            past = usual.get(layer)
            known = past if isinstance(past, (int, float)) else _usual(run, layer)
            cap = self.share if self.share is not None else self.times * known
            if np.isfinite(cap) and cap > 0:
                caps[layer] = cap
        if not caps:
            raise NotApplicable(
                "no reading shows how much a step usually changes queries and keys: give a share"
            )
        return UpdateCap(run, caps, {} if self.share is not None else _usual_rates(run))

    def check_saved(self, effect: Stored) -> None:
        _ = [cap.number() for _, cap in effect["caps"].items()]
        if "rates" in effect:
            effect["rates"].numbers()
        else:  # stored when the largest rate of all groups was followed
            effect["rate"].maybe(Stored.number)

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        caps = {str(layer): float(cap) for layer, cap in state["caps"].items()}
        if "rates" in state:
            return UpdateCap(run, caps, {str(k): float(rate) for k, rate in state["rates"].items()})
        # stored when the largest rate of all groups was followed
        known = {g.key: rate for g in run.groups if (rate := run.scheduled_rate(g)) is not None}
        fastest = max(known, key=lambda key: known[key], default=None)
        rate = state["rate"]
        return UpdateCap(run, caps, {} if fastest is None or not rate else {fastest: float(rate)})


def _usual(run: TrainingRun, layer: str) -> float:
    """Return the usual change of a layer's queries and keys in one step.

    It is a share of their norm; NaN where no reading holds it.
    """
    shares = [
        reading.query_key[layer].relative_update
        for reading in run.history.readings[:-1]
        if layer in reading.query_key
    ]
    shares = [share for share in shares[-PAST:] if np.isfinite(share)]
    return float(np.median(shares)) if shares else float("nan")


def _usual_rates(run: TrainingRun) -> dict[str, float]:
    """Return the median scheduled rate of each parameter group in the same readings."""
    rates: dict[str, list[float]] = {}
    for reading in run.history.readings[:-1][-PAST:]:
        for key, rate in reading.learning_rates.items():
            rates.setdefault(key, []).append(rate)
    return {key: float(np.median(known)) for key, known in rates.items()}
