"""A ceiling on the scale of a layer's attention scores."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from stabmon._settings import Bounds
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect, HeldEffect
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.interventions.soften_logits import scale_of
from stabmon.model_names import SCALES
from stabmon.projections.not_applicable import NotApplicable
from stabmon.rules.evidence.norm_growth import sustained_growth


@intervention
@dataclass(frozen=True)
class CapScale(Intervention):
    r"""Hold a layer's scale of scores at its earlier value.

    With scores :math:`s = \alpha\, q^\top k`, the attribute that holds :math:`\alpha` becomes
    :math:`\min(\alpha, \alpha_\text{cap})` after every optimizer step, as long as this is held.

    It mitigates sustained growth of the scale (``logit_growth`` of a layer, by ``scale``): training
    goes on at the temperature under which the model has learned. A clip of the weights would have
    to shrink them for as long as the scale grows, and steps of the old size turn small weights at
    random. Of four failing runs of this project whose scale drifted, clipping left gaps to the
    paired control run of 0.02 to 0.11 nats.

    Layers whose scale grows alike are held together with those that the issues name. After a
    release the scale stays at the ceiling, which is the model's own earlier value.

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
        held: dict[str, tuple[str, float]] = {}
        refused: list[NotApplicable] = []
        for layer in dict.fromkeys([*named, *alike]):
            try:
                name = scale_of(run.module(layer), layer)
                held[layer] = (
                    name,
                    self._ceiling(run, layer, since, getattr(run.module(layer), name)),
                )
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
            layer, name, value = each.parts(3)
            _ = layer.text(), name.one_of(SCALES), value.number()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return _Held(
            run,
            {
                layer: (scale_of(run.module(layer), layer), float(cap))
                for layer, _, cap in state["caps"]
            },
        )

    def _ceiling(self, run: TrainingRun, layer: str, since: int, now: float) -> float:
        """Return the largest scale that the layer may have."""
        if self.cap is not None:
            return self.cap
        read = {
            reading.step: reading.info[layer].scale
            for reading in run.history.readings
            if layer in reading.info
        }
        newest = run.history.info.get(layer)
        if newest is None or since not in read or not 0.5 * newest.scale < now < 2.0 * newest.scale:
            raise NotApplicable(f"the scale that {layer} holds is not the one that was measured")
        return read[since]


class _Held(HeldEffect):
    """The ceilings of several layers, and the scales from before."""

    def __init__(self, run: TrainingRun, caps: Mapping[str, tuple[str, float]]) -> None:
        self.caps = caps
        self._modules: dict[str, nn.Module] = {layer: run.module(layer) for layer in caps}
        before = self._scales()
        self._before = {
            layer: getattr(self._modules[layer], name) for layer, (name, _) in caps.items()
        }
        self._set()
        super().__init__(
            places=[(layer, None) for layer in caps],
            before=before,
            after=self._scales(),
            resources=frozenset(f"scores of {layer}" for layer in caps),
        )
        self._remove = [run.step_hooks.add("on_step", self._set, first=True)]

    def undo(self) -> bool:
        self.release()
        exact = True
        for layer, (name, cap) in self.caps.items():
            now = getattr(self._modules[layer], name)
            exact &= now in (cap, self._before[layer])
            setattr(self._modules[layer], name, self._before[layer])
        return exact

    def state_dict(self) -> dict[str, Any]:
        return {"caps": [[layer, name, cap] for layer, (name, cap) in self.caps.items()]}

    def _set(self) -> None:
        for layer, (name, cap) in self.caps.items():
            if getattr(self._modules[layer], name) > cap:
                setattr(self._modules[layer], name, cap)
                self._bound = True

    def _scales(self) -> dict[str, float]:
        return {
            f"{layer}.{name}": getattr(self._modules[layer], name)
            for layer, (name, _) in self.caps.items()
        }
