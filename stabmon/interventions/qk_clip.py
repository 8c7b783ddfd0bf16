"""Scale the query and key weights of a head so that its scores come back to where they were."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import numpy as np

from stabmon._settings import Bounds, Factor
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import Intervention, intervention
from stabmon.interventions.effects.effect import Effect, Place
from stabmon.interventions.effects.score_clip import ScoreClip
from stabmon.interventions.run.score_targets import baselines, largest_product
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.projections.scaling import check_saved_rows
from stabmon.records import StabilityIssue


@intervention
@dataclass(frozen=True)
class QkClip(Intervention):
    r"""QK-clip: multiply a head's scores by :math:`\gamma = \min(1, \tau / S)`, S its largest
    score, by way of its weights.

    Of all acts tried it repairs most at the least cost: on ten small runs that failed from
    attention it closed the gap to the healthy twin in seven, and cost a healthy run nothing.

    :math:`\tau` is twice the head's own largest score before it grew (``times_own_past``), at least
    ``floor``, and never beyond a quarter of what the number format holds; where scores outgrew a
    format's digits it is the score that needs a bit less than there are; ``target`` sets it for all
    heads instead.

    W_q and W_k, and their biases, take :math:`\sqrt\gamma` each; where several query heads share a
    key head, W_q alone takes :math:`\gamma`, which leaves the siblings as they are. Under a norm of
    queries and keys the weights have no say, and its gain takes :math:`\gamma`: exact for one head
    if the norm has a gain a head, else all heads of the layer are scaled by the smallest
    :math:`\gamma` (the record says so). Position biases are not scaled. Master copies are edited
    with the weights. The optimizer's moments are left alone: an adaptive step does not depend on
    the gradient's scale, and the momentum that still points to growth is met by clipping again. But
    where heads were saturated from the start, the optimizer begins anew with them, since it knows
    the gradients of a model that is no longer there: moments of nothing, and a warm-up (of two runs
    that stayed 0.23 and 0.25 nats behind their twins otherwise, nothing and 0.05 were left).

    Under adapters it is refused where W_q is frozen and what is trained is added to it (LoRA): the
    sum scales as a whole only if the frozen weight is edited, which is often shared or packed and
    is not saved with the adapters, so that the clip would be lost. Adapters that multiply each
    feature (the magnitude of DoRA where there is no bias, the vector of IA3) are what is scaled.

    Which rows belong to a head is a guess from names and shapes until the step's batch has been run
    again: each guess is tried, and kept only if the head's score came to :math:`\tau` and no other
    head of the layer moved. Without a batch to run again the likeliest guess is taken, which the
    record says; no single batch of later judges it. Should its rows come to an eighth of their norm
    while no score has fallen, it is given up.

    While ``hold`` is on, every training forward's largest scores of these layers are watched, and a
    head above its :math:`\tau` is clipped again after the optimizer's step, until the act is
    released. Under a ``target`` the largest scores of the last eight steps count, each as it would
    be with the weights of now, since one batch's largest is often well below another's. A person's
    own is held also where no head is above its :math:`\tau` yet. Where it goes on clipping though
    no alarm is open, :math:`\tau` is doubled from time to time, up to ``widest``.

    Source:
        Kimi K2, arXiv:2507.20534; per-head max and clip. Measured: the project's own ten failing
        runs.
    """

    treats: ClassVar[Mapping[str, int]] = {"scores": 10, "sustained_growth": 30}
    # on ten small runs that failed from attention it closed the gap in 7, and cost nothing

    cost: ClassVar[float] = 0.0

    target: Annotated[float, Bounds(above=0, high=1e30)] | None = None
    """Largest score to clip to; None for each head's own past."""
    times_own_past: Factor = 2.0
    """Heads need room to learn: held at once their own past, repaired runs stayed 0.02 to 0.04 nats
    behind; at twice, none did.
    """
    floor: Factor = 10.0
    """Scores below it are never clipped: they leave a row its gradient."""
    widest: Annotated[float, Bounds(0, 1e30)] = 100.0
    """Score up to which what is held is doubled, each time it was at work for long without an
    alarm: heads of a healthy run go on growing, and one held at 10 to the end came out 0.09 nats
    behind. 100 held training stable at scale (Kimi K2)."""
    fresh: Factor = 1.0
    """Score to which a head is brought that was saturated from the start, and has no better past;
    from there it may grow to ``widest``.
    """
    hold: bool = True

    def _start(self, run: TrainingRun) -> Effect:
        targets: dict[Place, float] = {}
        limits: dict[Place, float] = {}
        for issue in self.issues:
            for place in _heads(run, issue):
                aim = self.aim(run, issue, place[1])
                targets[place] = min(aim, targets.get(place, np.inf))
                fixed = self.target is not None or issue.issue_type == "precision_insufficient"
                limits[place] = min(
                    aim if fixed else max(aim, self.widest), limits.get(place, np.inf)
                )
        if not targets:
            raise NotApplicable("no head is named: give an issue that names its layer")
        clip = ScoreClip(run, targets, limits, ceiling=self.target is not None)
        new = {
            place: self.fresh
            for issue in self.issues
            if issue.evidence.get("from_the_start")
            for place in _heads(run, issue)
        }
        try:
            clip.first(new if self.target is None else None, wait=self.hold and run.by_hand)
        except BaseException:
            clip.rows.undo()
            raise
        if new and self.target is None:
            clip.begin_anew()
        clip.watch(hold=self.hold)
        return clip

    def check_saved(self, effect: Stored) -> None:
        for name in ("aims", "limits"):
            for place in effect[name].parts():
                layer, head, score = place.parts(3)
                _ = layer.text(), head.integer(), score.number()
        _ = (
            [how.text() for _, how in effect["proven"].items()],
            effect["anew"].maybe(Stored.integer),
        )
        check_saved_rows(effect["rows"])

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        clip = ScoreClip(
            run,
            _by_place(state["aims"]),
            _by_place(state["limits"]),
            ceiling=self.target is not None,
        )
        clip.proven = dict(state["proven"])
        if state["anew"] is not None:
            clip.begin_anew(state["anew"])
        clip.rows.load(state["rows"])
        clip.watch(hold=self.hold)
        return clip

    def aim(self, run: TrainingRun, issue: StabilityIssue, head: int | None = None) -> float:
        """The score to clip to for the head that ``issue`` names, or for ``head`` where it names
        its layer alone.
        """
        if self.target is not None:
            return self.target
        if (
            issue.issue_type == "precision_insufficient"
            and issue.layer in run.history.layers
            and issue.head is not None
        ):
            now = float(run.history.now("max_logit")[run.history.of_layer(issue.layer)][issue.head])
            fitting: float = 2.0 ** (issue.threshold - issue.value - 1)  # a bit is a factor of two
            return max(self.floor, now * fitting)
        if issue.evidence.get("from_the_start"):
            return max(self.floor, self.widest)  # nothing drives it, and it must learn
        past = baselines(run, issue, head)
        aim = max(self.floor, self.times_own_past * past if np.isfinite(past) else 0.0)
        info = run.history.info.get(issue.layer or "")
        return aim if info is None else min(aim, largest_product(info.dtype) * info.scale)


def _by_place(values: Sequence[tuple[str, int, float]]) -> dict[Place, float]:
    return {(layer, int(head)): float(value) for layer, head, value in values}


def _heads(run: TrainingRun, issue: StabilityIssue) -> list[Place]:
    if issue.layer is None:
        return []
    if issue.head is not None:
        return [(issue.layer, issue.head)]
    info = run.history.info.get(issue.layer)
    return [] if info is None else [(issue.layer, head) for head in range(info.heads)]
