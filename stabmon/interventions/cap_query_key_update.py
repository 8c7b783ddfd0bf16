"""Hold what one step changes of W_q and W_k at or below what a step used to change of them."""

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
"""Newest readings whose median is what a step used to change."""


@intervention
@dataclass(frozen=True)
class CapQueryKeyUpdate(Intervention):
    r"""While it is held, each step's change of a layer's queries and keys is scaled by
    :math:`\min(1, c\,\|W\| / \|\Delta W\|)`.

    W is everything that makes the layer's queries and keys (under adapters: what they effectively
    make of it), :math:`\Delta W` what a step changed of it, and c is ``times`` the share
    :math:`\|\Delta W\| / \|W\|` that the layer's steps used to change (median of the readings
    before), and follows the scheduled rate from there. It takes out what a rate does that is wrong
    for queries and keys alone, whatever caused it and however large it is, and nothing else. Scores
    that have grown already it leaves as they are (clip them). Copies W_q and W_k from before each
    step to after it.

    Source:
        Rates for queries and keys in proportion to 1 / ||W||: Anson & Aitchison, arXiv:2511.21377;
        clipping of updates: Adafactor, arXiv:1804.04235.
    """

    treats: ClassVar[Mapping[str, int]] = {"step": 10}

    times: Factor = 1.25
    """Times its own past that a step's share may be. Where the rate is wrong every step is this
    large, so that it must be near its past.
    """
    share: Factor | None = None
    """c itself, instead, at any rate."""

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
                "it is not known what a step used to change of queries and keys: give a share"
            )
        return _Capped(run, caps, None if self.share is not None else _usual_rate(run))

    def check_saved(self, effect: Stored) -> None:
        _ = [cap.number() for _, cap in effect["caps"].items()], effect["rate"].maybe(Stored.number)

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return _Capped(
            run, {str(layer): float(cap) for layer, cap in state["caps"].items()}, state["rate"]
        )


class _Capped(HeldEffect):
    def __init__(self, run: TrainingRun, caps: Mapping[str, float], rate: float | None) -> None:
        self.run, self._rate = run, rate
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
                why = error
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
        """What adapters effectively made before the step, by its norm."""
        self._remove = [
            run.step_hooks.add("before_optimizer_step", self._remember),
            run.step_hooks.add(
                "on_step", self._scale, first=True
            ),  # a clip that is held comes after the step that it clips
        ]

    def release(self) -> None:
        super().release()
        self._before = {}

    def state_dict(self) -> dict[str, Any]:
        return {"caps": dict(self.caps), "rate": self._rate}

    @torch.no_grad()
    def _remember(self) -> None:
        if self._before:  # another optimizer of the same step: some may have been moved already
            return
        self._before = {
            layer: [[rows.view(copy).detach().clone() for copy in copies] for rows, copies in parts]
            for layer, parts in self._parts.items()
        }
        self._weights = {layer: effective.before() for layer, effective in self._adapters.items()}

    @torch.no_grad()
    def _scale(self) -> None:
        rate = _rate_now(self.run)
        of_schedule = rate / self._rate if rate is not None and self._rate else 1.0
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
                of_schedule
                * self.caps[layer]
                * weight
                / change.clamp_min(torch.finfo(torch.float32).tiny)
            ).clamp(max=1.0)
            bound = factor < 1
            self._bound = (
                bound if self._bound is False else self._bound | bound.to(self._bound.device)
            )
            finite = torch.isfinite(change)  # what is not finite is for others to mend
            for (rows, copies), olds in zip(parts, before, strict=True):
                for copy, old in zip(copies, olds, strict=True):
                    view = rows.view(copy)
                    scaled = torch.lerp(old, view, factor.to(device=view.device, dtype=view.dtype))
                    view.copy_(torch.where(finite & bound, scaled, view))
        self._before = {}


def _usual(run: TrainingRun, layer: str) -> float:
    """What a step used to change of the layer's queries and keys, over their norm; NaN where that
    was not seen.
    """
    shares = [
        reading.query_key[layer].relative_update
        for reading in run.history.readings[:-1]
        if layer in reading.query_key
    ]
    shares = [share for share in shares[-PAST:] if np.isfinite(share)]
    return float(np.median(shares)) if shares else float("nan")


def _usual_rate(run: TrainingRun) -> float | None:
    """The scheduled rate at those readings; None where it is not known."""
    rates = [
        reading.learning_rate
        for reading in run.history.readings[:-1][-PAST:]
        if reading.learning_rate
    ]
    return float(np.median(rates)) if rates else None


def _rate_now(run: TrainingRun) -> float | None:
    rates = [rate for group in run.groups if (rate := run.scheduled_rate(group)) is not None]
    return max(rates, default=None)
