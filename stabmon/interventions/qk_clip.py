"""QK-clip: smaller query and key weights for heads whose scores have grown."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal

import numpy as np

from stabmon._settings import Bounds, Factor
from stabmon._storage.stored_value import Stored
from stabmon.interventions.base import Applied, Intervention, intervention
from stabmon.interventions.effects.effect import Effect, Place
from stabmon.interventions.effects.score_clip import ScoreClip
from stabmon.interventions.run.score_targets import (
    baselines,
    largest_score,
    largest_until,
    onset,
)
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.not_applicable import NotApplicable
from stabmon.projections.scaling import check_saved_rows
from stabmon.records import StabilityIssue


@intervention
@dataclass(frozen=True)
class QkClip(Intervention):
    r"""Scale down W_q and W_k of heads with large scores.

    The scores of a head whose largest score is S are multiplied by
    :math:`\gamma = \min(1, \tau / S)`. Of all interventions tried it repairs most at the least
    cost: on ten small runs that failed from attention it closed the gap to the paired control run
    in seven, and cost a healthy run nothing.

    **Heads.** It takes the heads that the issues name, or with ``heads="all"`` all of the model.
    What makes one head grow acts on all: one by one they were clipped at scores of 130 to 300,
    which left gaps of 1.90 nats in sum over eight runs; all at once, at the first alarm, left 1.20.

    **Target.** :math:`\tau` is twice the head's own largest score before growth began
    (``times_own_past``), at least ``floor``, and at most a quarter of the number format's largest
    value. Growth began where the first of the named heads left its past. Where scores need more
    digits than the format has (``precision_insufficient``), it is the score that needs one bit
    fewer than there are. ``target`` sets it for all heads instead.

    **Steps.** Clipped weights are small, while an adaptive step keeps its size: it would change
    ever more of them, up to more than all in one step where the rate of W_q and W_k is what is
    wrong. So a step changes ``step_share`` of a held layer's W_q and W_k at most. With it gaps of
    0.80, 0.99 and 0.66 nats under rates of W_q and W_k that were 30 to 100 times too high became
    0.01, -0.01 and -0.02; a healthy run clipped and held from step 20 on paid 0.02.

    **Weights.** W_q and W_k, and their biases, are multiplied by :math:`\sqrt\gamma` each. Where
    several query heads share a key head, W_q alone is multiplied by :math:`\gamma`, so that the
    other heads do not change. Under a norm of queries and keys the scale of the weights has no
    effect, and the norm's gain is multiplied by :math:`\gamma`: for one head if the norm has a gain
    per head, else for all heads of the layer by the smallest :math:`\gamma`, which the record
    states. Position biases are not scaled. Master copies are edited with the weights.

    **Rates.** Where the rate is too high for the whole model, its other weights are changed too fast
    as well, and the loss stays behind although the scores are held. While all heads are held and a
    step changes more than twice ``model_share`` of the other weights, the rates are lowered to what
    changes ``model_share``, and held there as ceilings
    (:class:`~stabmon.interventions.effects.fitting_rate.FittingRate`).

    **Optimizer.** Its moments are kept: an adaptive step does not depend on the gradient's scale,
    and momentum that still points to growth is met by clipping again. Only where heads were
    saturated from the start are the moments set to zero, with a warm-up, since they describe a
    model that no longer exists. Of two runs that otherwise stayed 0.23 and 0.25 nats behind their
    paired control runs, 0 and 0.05 nats were left.

    **Adapters.** It is refused where W_q is frozen and the trained part is added to it (LoRA): the
    sum scales as a whole only if the frozen weight is edited, which is often shared or packed and
    is not saved with the adapters, so that the clip would be lost. Adapters that multiply each
    feature (the magnitude of DoRA without a bias, the vector of IA3) are scaled themselves.

    **Proof.** The rows of a head are guessed from names and shapes. Where the step's batch can be
    replayed each guess is tried, and kept only if the head's score comes to :math:`\tau` and no
    other head of the layer changes. Without a replay the likeliest guess is taken, which the record
    states. It is given up once its rows have shrunk to an eighth of their norm while no score has
    fallen; no single later batch decides it.

    **Hold.** With ``hold`` the largest scores of these layers are read in every training forward,
    and a head above its :math:`\tau` is clipped again after the optimizer's step, until this is
    released. Under a ``target`` the largest scores of the last eight steps count, each converted to
    the present weights, since the largest score of one batch is often well below another's. One
    applied by a person is held even if no head is above its :math:`\tau` yet. Where a head clips
    without an open alarm, its :math:`\tau` is doubled from time to time, up to ``widest``; none is
    while some head would double its score between two such times, since its cause is then still at
    work. A later clip of all heads takes the place of an earlier one: it begins again from its first
    targets where they were raised since, and else from half of them, since what they allowed alarmed.

    Example:
        >>> clip = QkClip(target=50.0, hold=False)
        >>> clip.name, clip.target, clip.floor
        ('qk_clip', 50.0, 10.0)
        >>> issue = StabilityIssue(7, "attn", 0, "logit_growth", "error", 80.0, 50.0, "")
        >>> clip.aim(TrainingRun(None), issue)
        50.0

    References:
        Kimi K2, arXiv:2507.20534: largest score and clip per head.
    """

    treats: ClassVar[Mapping[str, int]] = {"scores": 10, "sustained_growth": 30}
    # on ten small runs that failed from attention it closed the gap in 7, and cost nothing

    cost: ClassVar[float] = 0.0

    target: Annotated[float, Bounds(above=0, high=1e30)] | None = None
    """Largest score of every head, above 0; None to derive it from each head's own past."""
    times_own_past: Factor = 2.0
    """Target, as a multiple of the head's largest score before it grew.

    Heads need room to learn: held at 1, repaired runs stayed 0.02 to 0.04 nats behind; at 2, none
    did.
    """
    floor: Factor = 10.0
    """Score below which no head is clipped: softmax rows then keep their gradient."""
    widest: Annotated[float, Bounds(0, 1e30)] = 100.0
    """Largest score up to which a held target is doubled.

    It is doubled each time that it clipped for long without an alarm: heads of a healthy run go on
    growing, and one held at 10 to the end came out 0.09 nats behind. 100 held training stable at
    scale (Kimi K2).
    """
    fresh: Factor = 1.0
    """Score to which a head is scaled that was saturated from the start.

    Such a head has no better past. From there it may grow to ``widest``.
    """
    heads: Literal["all", "named"] = "named"
    """Heads that the issues name, or ``all`` of the model, as the preset ``guard`` does."""
    step_share: Factor | None = 0.025
    """Largest share of a held layer's W_q and W_k that one step may change; None for no limit.

    Steps of healthy runs of small models changed 0.01 of them at their peak, at three times the
    usual rate 0.02.
    """
    model_share: Factor | None = 0.01
    """Share of the model that one step may change while all heads are held; None for no limit.

    Where a step changes more than twice that, the rates of all parameter groups are lowered.
    """
    hold: bool = True
    """True to clip again after later steps; False to clip once."""

    def _start(self, run: TrainingRun) -> Effect:
        targets: dict[Place, float] = {}
        limits: dict[Place, float] = {}
        for issue in self.issues:
            fixed = self.target is not None or issue.issue_type == "precision_insufficient"
            for place in _heads(run, issue):
                aim = self.aim(run, issue, place[1])
                targets[place] = min(aim, targets.get(place, np.inf))
                limit = aim if fixed else self._limit(run, place, aim)
                limits[place] = min(limit, limits.get(place, np.inf))
        if not targets:
            raise NotApplicable("no head is named: give an issue that names its layer")
        named = list(targets)
        earlier = self._earlier(run)
        if self.heads == "all":
            for place, aim in self._others(run).items():
                if place not in targets:
                    targets[place], limits[place] = aim, self._limit(run, place, aim)
            for place, aim in self._tightened(earlier).items():
                targets[place] = limits[place] = min(aim, targets.get(place, np.inf))
        clip = ScoreClip(run, targets, limits, ceiling=self.target is not None)
        new = {
            place: self.fresh
            for issue in self.issues
            if issue.evidence.get("from_the_start")
            for place in _heads(run, issue)
        }
        try:
            clip.clip_now(
                new if self.target is None else None,
                named=named,
                wait=self.hold and (run.by_user or self.heads == "all"),
                idle=self.hold and run.by_user,
            )
        except BaseException:
            clip.rows.undo()
            raise
        if new and self.target is None:
            clip.reset_optimizer()
        for each in earlier:
            each.release("a later clip of all heads takes its place, with no higher targets")
        caps = [each.effect.state_dict()["rates"] for each in earlier]
        clip.watch(self.hold, self.step_share, self._model_share, caps[-1] if caps else None)
        return clip

    @property
    def _model_share(self) -> float | None:
        return self.model_share if self.heads == "all" else None

    def _earlier(self, run: TrainingRun) -> list[Applied]:
        """Return the clips of all heads that are held, and whose place this one takes."""
        ours = self.heads == "all" and self.hold and not run.by_user
        return [
            each
            for each in run.applied
            if ours
            and each.active
            and not each.by_user
            and isinstance(each.intervention, QkClip)
            and each.intervention.heads == "all"
            and isinstance(each.effect, ScoreClip)
        ]

    def _tightened(self, earlier: Sequence[Applied]) -> dict[Place, float]:
        """Return the first targets of earlier clips; half of them where none had been raised.

        Raises:
            NotApplicable: if they are held at the floor, and an alarm is open nevertheless.
        """
        found: dict[Place, float] = {}
        for each in earlier:
            clip = each.effect
            assert isinstance(clip, ScoreClip)
            raised = any(clip.targets[k] > aim for k, aim in clip.first_targets.items())
            for place, aim in clip.first_targets.items():
                found[place] = aim if raised else min(aim, max(self.floor, aim / 2))
            if not raised and all(found[k] == clip.targets[k] for k in clip.targets):
                raise NotApplicable("every head is held at its lowest target already")
        return found

    def _others(self, run: TrainingRun) -> dict[Place, float]:
        """Return the target of every head of the model by its own past."""
        since = [
            step
            for issue in self.issues
            for _, head in _heads(run, issue)
            if (step := onset(run, issue, head)) is not None
        ]
        anew = any(issue.evidence.get("from_the_start") for issue in self.issues)
        found: dict[Place, float] = {}
        for layer in run.history.layers:
            past = largest_until(run, layer, min(since, default=None))
            most = largest_score(run.history.info.get(layer))
            for head, score in enumerate(past.tolist()):
                aim = self.widest if anew else self.floor
                if np.isfinite(score):
                    aim = max(aim, self.times_own_past * score)
                found[layer, head] = self.target or min(aim, most)
        return found

    def _limit(self, run: TrainingRun, place: Place, aim: float) -> float:
        """Return the score up to which a head's target may be raised."""
        most = min(self.widest, largest_score(run.history.info.get(place[0] or "")))
        return max(aim, most if self.target is None else 0.0)

    def check_saved(self, effect: Stored) -> None:
        for name in ("aims", "limits", *(("first",) if "first" in effect else ())):
            for place in effect[name].parts():
                layer, head, score = place.parts(3)
                _ = layer.text(), head.integer(), score.number()
        _ = (
            [how.text() for _, how in effect["proven"].items()],
            effect["anew"].maybe(Stored.integer),
        )
        if "rates" in effect:
            effect["rates"].numbers()
        check_saved_rows(effect["rows"])

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        clip = ScoreClip(
            run,
            _by_place(state["aims"]),
            _by_place(state["limits"]),
            ceiling=self.target is not None,
        )
        clip.first_targets = _by_place(state.get("first", state["aims"]))
        clip.proven = dict(state["proven"])
        if state["anew"] is not None:
            clip.reset_optimizer(state["anew"])
        clip.rows.load(state["rows"])
        clip.watch(self.hold, self.step_share, self._model_share, state.get("rates"))
        return clip

    def aim(self, run: TrainingRun, issue: StabilityIssue, head: int | None = None) -> float:
        """Return the score to clip a head to.

        Args:
            run: the run, whose history holds the head's past.
            issue: an issue that names the head, or its layer alone.
            head: the query head, where the issue names its layer alone.

        Returns:
            The largest absolute score allowed, above 0.

        Example:
            >>> issue = StabilityIssue(7, "attn", 0, "logit_growth", "error", 80.0, 50.0, "")
            >>> QkClip(floor=20.0).aim(TrainingRun(None), issue)
            20.0
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
            return max(self.floor, self.widest)  # no growth to stop, and the head must learn
        past = baselines(run, issue, head)
        aim = max(self.floor, self.times_own_past * past if np.isfinite(past) else 0.0)
        return min(aim, largest_score(run.history.info.get(issue.layer or "")))


def _by_place(values: Sequence[tuple[str, int, float]]) -> dict[Place, float]:
    """Return stored triples as scores by layer and head."""
    return {(layer, int(head)): float(value) for layer, head, value in values}


def _heads(run: TrainingRun, issue: StabilityIssue) -> list[Place]:
    """Return the heads that an issue concerns; all of the layer where it names none."""
    if issue.layer is None:
        return []
    if issue.head is not None:
        return [(issue.layer, issue.head)]
    info = run.history.info.get(issue.layer)
    return [] if info is None else [(issue.layer, head) for head in range(info.heads)]
