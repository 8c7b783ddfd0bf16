"""A ceiling on the change of W_q and W_k that one optimizer step may make."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from stabmon._settings import Factor
from stabmon._storage.stored_value import Stored
from stabmon._torch.tensors import is_sharded
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect, HeldEffect
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.adapters import EffectiveUpdate
from stabmon.projections.head_rows import Rows
from stabmon.projections.locate import find_effective, trained_rows
from stabmon.projections.master_weights import copies_of
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
        return _Capped(run, caps, {} if self.share is not None else _usual_rates(run))

    def check_saved(self, effect: Stored) -> None:
        _ = [cap.number() for _, cap in effect["caps"].items()]
        if "rates" in effect:
            effect["rates"].numbers()
        else:  # stored when the largest rate of all groups was followed
            effect["rate"].maybe(Stored.number)

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        caps = {str(layer): float(cap) for layer, cap in state["caps"].items()}
        if "rates" in state:
            return _Capped(run, caps, {str(k): float(rate) for k, rate in state["rates"].items()})
        # stored when the largest rate of all groups was followed
        known = {g.key: rate for g in run.groups if (rate := run.scheduled_rate(g)) is not None}
        fastest = max(known, key=lambda key: known[key], default=None)
        rate = state["rate"]
        return _Capped(run, caps, {} if fastest is None or not rate else {fastest: float(rate)})


class _Capped(HeldEffect):
    """The ceilings of several layers, and W_q and W_k from before the present step."""

    def __init__(
        self, run: TrainingRun, caps: Mapping[str, float], usual_rates: Mapping[str, float]
    ) -> None:
        self.run, self._usual_rates = run, dict(usual_rates)
        self._parts: dict[str, list[tuple[Rows, list[Tensor]]]] = {}
        self._adapters: dict[str, EffectiveUpdate] = {}
        refused = []
        why: NotApplicable | None = None
        for layer in caps:
            try:
                module, info = run.module(layer), run.history.info.get(layer)
                rows, effective = trained_rows(module, info), find_effective(module, info)
                if any(is_sharded(each.parameter) for each in rows):
                    raise NotApplicable("its parameters are sharded")
                self._parts[layer] = [(each, copies_of(each.parameter, run)) for each in rows]
                if effective is not None:
                    self._adapters[layer] = effective
            except NotApplicable as error:
                refused.append(layer)
                why = error.with_traceback(None)
        if not self._parts:
            raise why or NotApplicable("no attention layer is known")
        self.caps = {layer: caps[layer] for layer in self._parts}
        super().__init__(
            places=[(layer, None) for layer in self._parts],
            after={"share": dict(self.caps)},
            note=f"not in {', '.join(refused)}" if refused else "",
        )
        self._before: dict[str, list[list[Tensor]]] = {}
        self._weights: dict[str, Tensor] = {}
        """Norm of each layer's effective weight before the step, under adapters."""
        self._remove = [
            run.step_hooks.add("before_optimizer_step", self._remember),
            # First: a held clip acts on the scores of the shortened step.
            run.step_hooks.add("on_step", self._scale, first=True),
        ]

    def release(self) -> None:
        super().release()
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        return {"caps": dict(self.caps), "rates": dict(self._usual_rates)}

    @torch.no_grad()
    def _remember(self) -> None:
        if self._before:  # another optimizer of this step may have changed the weights already
            return
        self._before = {
            layer: [[rows.view(copy).detach().clone() for copy in copies] for rows, copies in parts]
            for layer, parts in self._parts.items()
        }
        self._weights = {layer: effective.before() for layer, effective in self._adapters.items()}

    @torch.no_grad()
    def _scale(self) -> None:
        schedule_factor = _schedule_factor(self.run, self._usual_rates)
        for layer, before in self._before.items():
            parts = self._parts[layer]
            if layer in self._adapters:
                weight, change = (
                    self._weights[layer].float(),
                    self._adapters[layer].change().float(),
                )
            else:
                was = [each[0] for each in before]
                now = [rows.view(copies[0]) for rows, copies in parts]
                weight = torch.linalg.vector_norm(
                    torch.stack([torch.linalg.vector_norm(each.float()) for each in was])
                )
                change = torch.linalg.vector_norm(
                    torch.stack(
                        [
                            torch.linalg.vector_norm(b.float() - a.float())
                            for a, b in zip(was, now, strict=True)
                        ]
                    )
                )
            factor = (
                schedule_factor
                * self.caps[layer]
                * weight
                / change.clamp_min(torch.finfo(torch.float32).tiny)
            ).clamp(max=1.0)
            bound = factor < 1
            self._bound = (
                bound if self._bound is False else self._bound | bound.to(self._bound.device)
            )
            finite = torch.isfinite(change)  # NaN and inf are left to other interventions
            for (rows, copies), olds in zip(parts, before, strict=True):
                for copy, old in zip(copies, olds, strict=True):
                    view = rows.view(copy)
                    scaled = torch.lerp(old, view, factor.to(device=view.device, dtype=view.dtype))
                    view.copy_(torch.where(finite & bound, scaled, view))
        self._before = {}


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


def _schedule_factor(run: TrainingRun, usual: Mapping[str, float]) -> float:
    """Return the scheduled rate over the usual one, the lower median over groups."""
    factors = sorted(
        rate / usual[group.key]
        for group in run.groups
        if usual.get(group.key, 0.0) > 0 and (rate := run.scheduled_rate(group)) is not None
    )
    return factors[(len(factors) - 1) // 2] if factors else 1.0
