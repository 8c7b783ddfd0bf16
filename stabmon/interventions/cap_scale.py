"""A ceiling on the scale of a layer's attention scores."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from stabmon._settings import Bounds
from stabmon._storage.stored_value import Stored
from stabmon.capture import compiled_modules
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect, HeldEffect
from stabmon.interventions.effects.scale_attribute import (
    AtForward,
    ScaleAttribute,
    find_scale,
    stored_scale,
)
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.rules.evidence.norm_growth import sustained_growth


@intervention
@dataclass(frozen=True)
class CapScale(Intervention):
    r"""Hold a layer's scale of scores at its earlier value.

    With scores :math:`s = \alpha\, q^\top k`, the attribute that holds :math:`\alpha` is
    :math:`\min(\alpha, \alpha_\text{cap})` in every forward of the module, in training and in
    evaluation, as long as this is held, whatever the training loop writes there at each step.
    Between forwards it has its own value. It is found by running the step's batch again: the number
    of the module, of any name, that its scores are proportional to, or their divisor. In a compiled
    model the attribute is set after each step instead.

    It mitigates sustained growth of the scale (``logit_growth`` of a layer, by ``scale``): training
    goes on at the temperature under which the model has learned. A clip of the weights would have
    to shrink them for as long as the scale grows, and steps of the old size turn small weights at
    random. Of four failing runs of this project whose scale drifted, clipping left gaps to the
    paired control run of 0.02 to 0.11 nats.

    Layers whose scale grows alike are held together with those that the issues name. Undone, the
    module has the value that it would have had. After a release, and when the monitor is closed, it
    stays at the ceiling: the model has been trained there.

    Example:
        >>> CapScale(cap=0.125).settings
        {'cap': 0.125}
    """

    treats: ClassVar[Mapping[str, int]] = {"sustained_growth": 20}

    cap: Annotated[float, Bounds(above=0, high=1e30)] | None = None
    """Largest scale, above 0; None for the scale when the growth began.

    The issue's evidence names that step as ``since_step``.
    """

    def _start(self, run: TrainingRun) -> Effect:
        if self.cap is None and not any(
            issue.evidence.get("by") == "scale" for issue in self.issues
        ):
            raise NotApplicable("no issue shows that the scale of the scores grows: give a cap")
        since = min(
            (int(i.evidence["since_step"]) for i in self.issues if "since_step" in i.evidence),
            default=run.step,
        )
        named = [issue.layer.partition("#")[0] for issue in self.issues if issue.layer is not None]
        alike = [
            layer
            for layer in run.known_layers()
            if (found := sustained_growth(run.history, layer, grown=1.2)) and found.of_scale
        ]
        held: dict[str, tuple[ScaleAttribute, float]] = {}
        refused: list[NotApplicable] = []
        for layer in dict.fromkeys([*named, *alike]):
            try:
                scale = find_scale(run, layer)
                held[layer] = scale, self._limit(run, layer, since, scale)
            except NotApplicable as error:
                refused.append(error.with_traceback(None))
        if not held:
            raise (
                refused[0]
                if refused
                else NotApplicable("no layer is named: give an issue that names its layer")
            )
        effect = _Held(run, held)
        effect.note = "; ".join(f"left out: {error.reason}" for error in refused)
        return effect

    def check_saved(self, effect: Stored) -> None:
        for each in effect["caps"].parts():
            layer, path, value = each.parts(3)
            _ = layer.text(), path.text(), value.number()
        _ = [layer.text() for layer in effect.get("divisors", []).parts()]

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        divisors = state.get("divisors", ())
        return _Held(
            run,
            {
                layer: (stored_scale(run, layer, path, layer in divisors), float(limit))
                for layer, path, limit in state["caps"]
            },
        )

    def _limit(self, run: TrainingRun, layer: str, since: int, scale: ScaleAttribute) -> float:
        """Return the value at which the scale's attribute is held."""
        if self.cap is not None:
            return scale.of_scale(self.cap)
        read = {
            reading.step: reading.info[layer].scale
            for reading in run.history.readings
            if layer in reading.info
        }
        if since not in read or scale.per_scale is None:
            raise NotApplicable(f"the scale that {layer} holds is not the one that was measured")
        return scale.of_scale(read[since])


class _Held(HeldEffect):
    """The limits on the scales of several layers, in force whenever these run.

    Where compiled code may pass hooks by, the attributes are limited after each step instead.
    """

    def __init__(
        self, run: TrainingRun, limits: Mapping[str, tuple[ScaleAttribute, float]]
    ) -> None:
        self._limits = dict(limits)
        before = self._values()
        after = {
            f"{layer}.{scale.path}": float(scale.limited(limit))
            for layer, (scale, limit) in limits.items()
        }
        super().__init__(
            places=[(layer, None) for layer in limits],
            before=before,
            after=after,
            resources=frozenset(f"scores of {layer}" for layer in limits),
        )
        self._own = {layer: float(scale.value) for layer, (scale, _) in limits.items()}
        self._is_compiled = bool(compiled_modules(run.model))
        if self._is_compiled:
            self._set()
            self._remove = [run.step_hooks.add("on_step", self._set, first=True)]
            return
        self._remove = [
            AtForward(scale, functools.partial(self._used, scale, limit)).remove
            for scale, limit in limits.values()
        ]

    def undo(self) -> bool:
        super().release()
        exact = True
        for layer, (scale, limit) in self._limits.items() if self._is_compiled else ():
            exact &= float(scale.value) in (limit, self._own[layer])
            scale.write(self._own[layer])
        return exact

    def release(self) -> None:
        """Stop, with the scales left where training had them: at their limits."""
        if self._remove:
            super().release()
            self._set()

    def state_dict(self) -> dict[str, Any]:
        caps = [[layer, scale.path, limit] for layer, (scale, limit) in self._limits.items()]
        return {
            "caps": caps,
            "divisors": [layer for layer, (scale, _) in self._limits.items() if scale.is_divisor],
        }

    def _used(self, scale: ScaleAttribute, limit: float) -> Any:
        """Return the value of an attribute to run with."""
        self._bound = self._bound | scale.exceeds(limit)
        return scale.limited(limit)

    def _set(self) -> None:
        for scale, limit in self._limits.values():
            if bool(scale.exceeds(limit)):
                scale.write(limit)
                self._bound = True

    def _values(self) -> dict[str, float]:
        return {
            f"{layer}.{scale.path}": float(scale.value)
            for layer, (scale, _) in self._limits.items()
        }
