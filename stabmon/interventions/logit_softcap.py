"""A smooth cap on attention scores, in models that support one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from torch import nn

from stabmon._settings import Bounds
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.attributes import AttributesChanged, described
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.score_replay import can_replay, replay
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.model_names import SOFTCAPS
from stabmon.projections.not_applicable import NotApplicable

CODE = (
    "scores = {cap:g} * torch.tanh(scores / {cap:g})  # in the attention's forward, before the "
    "mask is added"
)


@intervention
@dataclass(frozen=True)
class LogitSoftcap(Intervention):
    r"""Bound scores smoothly, where the layer has a setting.

    A score s becomes :math:`c \tanh(s / c)`, with c for ``cap``.

    It needs a module with a softcap attribute (such as Gemma 2), and a replay of the step's batch
    that shows that the kernel applies it. In all other models it is a change of architecture: the
    refusal then shows the line of code to change. It repaired one of ten failing runs, with a jump
    of the loss. The attribute is no weight, so a model trained with it must keep it; the record
    names the config value.

    Example:
        >>> LogitSoftcap(cap=30.0).settings
        {'cap': 30.0}

    References:
        Gemma 2, arXiv:2408.00118.
    """

    treats: ClassVar[Mapping[str, int]] = {"scores": 30}
    # it closed the gap in 1 of the same ten runs

    cost: ClassVar[float] = 0.0

    cap: Annotated[float, Bounds(above=0, high=1e4)] = 50.0
    """Bound on the absolute score, in (0, 1e4]."""

    def _start(self, run: TrainingRun) -> Effect:
        layers = list(
            dict.fromkeys(
                issue.layer.partition("#")[0] for issue in self.issues if issue.layer is not None
            )
        )
        advice = CODE.format(cap=self.cap)
        if not layers:
            raise NotApplicable("no layer is named: give an issue that names its layer", advice)
        found: dict[str, tuple[str, Any]] = {}
        refused: list[NotApplicable] = []
        for layer in layers:
            try:
                found[layer] = self._place(run, layer)
            except NotApplicable as error:
                refused.append(error.with_traceback(None))
        if found and not can_replay(run):
            raise NotApplicable(
                "there is no batch to replay that could show whether the kernel applies a softcap",
                advice,
            )
        if found:
            shown = self._shown(run, found)
            wrong = "the attention kernel of {} applies no softcap"
            refused += [
                NotApplicable(wrong.format(each), "attn_implementation='eager' does")
                for each in found
                if each not in shown
            ]
            found = {layer: place for layer, place in found.items() if layer in shown}
        if not found:
            raise refused[0]
        effect = _Capped(run, found, self.cap)
        effect.note = "; ".join([effect.note, *(f"left out: {error.reason}" for error in refused)])
        return effect

    def _place(self, run: TrainingRun, layer: str) -> tuple[str, Any]:
        """Return the attribute that holds a layer's softcap, and its value."""
        module = run.module(layer)
        name = next((n for n in SOFTCAPS if n in vars(module)), None)
        if name is None:
            advice = CODE.format(cap=self.cap)
            raise NotApplicable(
                f"{layer} ({type(module).__name__}) has no softcap to set: it is a change of "
                "architecture",
                advice,
            )
        before = getattr(module, name)
        if before is not None and before <= self.cap:
            raise NotApplicable(f"{layer} caps its scores at {before:g} already")
        return name, before

    def _shown(self, run: TrainingRun, found: Mapping[str, tuple[str, Any]]) -> set[str]:
        """Return the layers whose kernel applies the cap, by a replay of the batch.

        The cap is set in all layers for the replay, and undone after it.
        """
        trial = _Capped(run, found, self.cap)
        seen: set[str] = set()
        try:
            replay(run, lambda call: seen.add(call.layer) if call.softcap == self.cap else None)
        finally:
            trial.undo()
        return seen

    def check_saved(self, effect: Stored) -> None:
        for each in effect["caps"].parts():
            layer, name, before = each.parts(3)
            _ = layer.text(), name.one_of(SOFTCAPS), before.maybe(Stored.number)

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return _Capped(
            run, {layer: (name, before) for layer, name, before in state["caps"]}, self.cap
        )


class _Capped(AttributesChanged):
    """The softcaps of several layers."""

    def __init__(self, run: TrainingRun, found: Mapping[str, tuple[str, Any]], cap: float) -> None:
        changes = [(layer, name, before, cap) for layer, (name, before) in found.items()]
        before, after = described(changes)
        modules: list[tuple[nn.Module, str, Any, Any]] = [
            (run.module(layer), name, was, now) for layer, name, was, now in changes
        ]
        super().__init__(
            places=[(layer, None) for layer in found],
            before=before,
            after=after,
            note=f"to keep it, set {', '.join(f'{layer}.{name}' for layer, name, *_ in changes)} "
            f"= {cap:g} in the model's config",
            resources=frozenset(f"softcap of {layer}" for layer in found),
            changes=modules,
        )
        self._state = [[layer, name, was] for layer, name, was, _ in changes]

    def state_dict(self) -> dict[str, Any]:
        return {"caps": self._state}
