"""More dropout of attention weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from torch import Tensor, nn

from stabmon._settings import Bounds
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import ATTENTION_AND_LOSS, Intervention, intervention
from stabmon.interventions.effects.attributes import AttributesChanged, described
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.score_replay import can_replay
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.model_names import DROPOUTS
from stabmon.projections.not_applicable import NotApplicable


@intervention
@dataclass(frozen=True)
class IncreaseDropout(Intervention):
    r"""Raise the dropout of attention weights.

    The probability p of each layer that the issues name, or of every layer, becomes
    :math:`\min(\text{most}, p + \text{by})`.

    **Preventive at best, never a repair, and costly.** It made every one of ten failing runs worse
    (median gap to the paired control run 0.63 nats, 0.44 without any intervention) and a healthy
    run 0.22 nats worse: a saturated row passes on almost none of dropout's gradient. It exists
    because users ask for it, and is chosen only where the configuration names it.

    It is set where the fused path reads it: a float of the module, or the ``p`` of its
    ``nn.Dropout``. Where the step's batch can be replayed, a layer whose output it does not change
    is refused (Falcon's fused path takes no dropout). Under ``torch.compile`` the first forward
    compiles again. Evaluation is not affected, as the module's training flag decides.

    Example:
        >>> IncreaseDropout(by=0.2).settings
        {'by': 0.2, 'most': 0.5}
    """

    treats: ClassVar[Mapping[str, int]] = dict.fromkeys(ATTENTION_AND_LOSS, 120)
    # it prevents and does not repair: last of all, and only where the configuration names it

    cost: ClassVar[float] = 0.22

    by: Annotated[float, Bounds(above=0, high=1)] = 0.1
    """Increase of the probability, in (0, 1]."""
    most: Annotated[float, Bounds(above=0, high=0.9)] = 0.5
    """Largest probability to set, in (0, 0.9]."""

    def _start(self, run: TrainingRun) -> Effect:
        named = [issue.layer for issue in self.issues if issue.layer is not None]
        layers = list(dict.fromkeys(named)) or run.known_layers()
        found: list[tuple[str, nn.Module, str, float, float]] = []
        for layer in layers:
            owner, name = _dropout_of(run.module(layer), layer)
            before = getattr(owner, name)
            after = min(self.most, before + self.by)
            if after > before and not any(owner is other for _, other, *_ in found):
                found.append((layer, owner, name, before, after))
        if not found:
            raise NotApplicable(
                f"dropout is at {self.most} or above already in {', '.join(layers) or 'no layer'}"
            )
        return self._change(run, found)

    def check_saved(self, effect: Stored) -> None:
        for each in effect["changes"].parts():
            layer, before, after = each.parts(3)
            _ = layer.text(), before.number(), after.number()

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        found = []
        for layer, before, after in state["changes"]:
            owner, name = _dropout_of(run.module(layer), layer)
            found.append((layer, owner, name, before, after))
        return _Dropout(found)

    def _change(
        self, run: TrainingRun, found: Sequence[tuple[str, nn.Module, str, float, float]]
    ) -> Effect:
        unread: list[str] = []
        before = _outputs(run, [run.module(layer) for layer, *_ in found])
        # One layer at a time: dropout of one changes the outputs of those after it. Without a
        # replay ``before`` is empty, and nothing is tried.
        for each, was in list(zip(found, before, strict=False)):
            trial = _Dropout([each])
            try:
                after = _outputs(run, [run.module(each[0])])
            finally:
                trial.undo()
            if after and torch.equal(after[0], was):
                unread.append(
                    f"the attention of {each[0]} does not read {each[2]} on its present path"
                )
                found = [other for other in found if other is not each]
        if not found:
            raise NotApplicable(unread[0])
        effect = _Dropout(found)
        effect.note = "; ".join(f"left out: {words}" for words in unread)
        return effect


class _Dropout(AttributesChanged):
    """The raised dropout of several layers."""

    def __init__(self, found: Sequence[tuple[str, nn.Module, str, float, float]]) -> None:
        before, after = described([(layer, name, old, new) for layer, _, name, old, new in found])
        super().__init__(
            places=[(layer, None) for layer, *_ in found],
            before=before,
            after=after,
            resources=frozenset(f"dropout of {layer}" for layer, *_ in found),
            changes=[(owner, name, old, new) for _, owner, name, old, new in found],
        )
        self._state = [[layer, old, new] for layer, _, _, old, new in found]

    def state_dict(self) -> dict[str, Any]:
        return {"changes": self._state}


def _dropout_of(module: nn.Module, layer: str) -> tuple[nn.Module, str]:
    """Return the module and the attribute that hold a layer's attention dropout."""
    for name in DROPOUTS:
        value = getattr(module, name, None)
        if isinstance(value, nn.Dropout):
            return value, "p"
        if isinstance(value, float):
            return module, name
    raise NotApplicable(
        f"{layer} ({type(module).__name__}) has no attention dropout that is known by its name "
        f"({', '.join(DROPOUTS)})"
    )


def _outputs(run: TrainingRun, modules: Sequence[nn.Module]) -> list[Tensor]:
    """Replay the newest step's first forward, and return the output of each module.

    The random numbers are those of the step. Empty where it cannot be replayed.
    """
    if not can_replay(run):
        return []
    seen: dict[int, Tensor] = {}
    handles = [module.register_forward_hook(_keeper(seen)) for module in modules]
    try:
        with run.forwards[0].again(run.model) as forward:
            forward()
    finally:
        for handle in handles:
            handle.remove()
    return (
        [seen[id(module)] for module in modules]
        if all(id(module) in seen for module in modules)
        else []
    )


def _keeper(seen: dict[int, Tensor]) -> Any:
    """Return a forward hook that copies the first output of each module."""

    def keep(module: nn.Module, _: Any, output: Any) -> None:
        first = output[0] if isinstance(output, tuple) else output
        if isinstance(first, Tensor):
            seen.setdefault(id(module), first.clone())

    return keep
