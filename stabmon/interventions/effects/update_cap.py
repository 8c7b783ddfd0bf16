"""Hold the change of W_q and W_k that an optimizer step makes below a ceiling."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from stabmon._torch.tensors import is_sharded
from stabmon.interventions.effects.effect import HeldEffect
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.adapters import EffectiveUpdate
from stabmon.projections.head_rows import Rows
from stabmon.projections.locate import find_effective, trained_rows
from stabmon.projections.master_weights import copies_of
from stabmon.projections.not_applicable import NotApplicable


class UpdateCap(HeldEffect):
    """Ceilings on the share of W_q and W_k that a step changes.

    Args:
        run: the run.
        caps: the ceiling of each layer, as a share of the norm of its W_q and W_k.
        usual_rates: the rate of each parameter group that the ceilings belong to; they follow the
            scheduled rates from there. Empty for fixed ceilings.

    Raises:
        NotApplicable: if it fits no layer.
    """

    def __init__(
        self,
        run: TrainingRun,
        caps: Mapping[str, float],
        usual_rates: Mapping[str, float] | None = None,
    ) -> None:
        self.run, self._usual_rates = run, dict(usual_rates or {})
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


def _schedule_factor(run: TrainingRun, usual: Mapping[str, float]) -> float:
    """Return the scheduled rate over the usual one, the lower median over groups."""
    factors = sorted(
        rate / usual[group.key]
        for group in run.groups
        if usual.get(group.key, 0.0) > 0 and (rate := run.scheduled_rate(group)) is not None
    )
    return factors[(len(factors) - 1) // 2] if factors else 1.0
