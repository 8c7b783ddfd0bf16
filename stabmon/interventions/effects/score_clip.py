"""Clip the scores of heads by their weights, and hold them at their targets."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from stabmon.interventions.effects.clip_report import ClipReport
from stabmon.interventions.effects.effect import HeldEffect, Place
from stabmon.interventions.effects.fitting_rate import FittingRate
from stabmon.interventions.effects.head_factors import (
    before_and_after,
    head_factors,
    layers_of,
    module_name,
    module_scores,
)
from stabmon.interventions.effects.row_proof import proven_rows
from stabmon.interventions.effects.step_scores import StepScores
from stabmon.interventions.effects.unproven_rows import UnprovenRows
from stabmon.interventions.effects.update_cap import UpdateCap
from stabmon.interventions.run.optimizer_reset import OptimizerReset
from stabmon.interventions.run.recent_scores import RecentScores
from stabmon.interventions.run.score_replay import deepest_first, largest_scores, replayed_scores
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.head_rows import QueryKey
from stabmon.projections.locate import find_query_key
from stabmon.projections.not_applicable import NotApplicable
from stabmon.projections.scaling import ScaledRows
from stabmon.records import AttentionCall


@dataclass
class _Tried:
    """Modules that a clip was tried on, here and on other stages."""

    notes: list[str] = field(default_factory=list)
    """Words on the rows of each module, the deepest first."""
    refused: list[NotApplicable] = field(default_factory=list)
    fails: set[str] = field(default_factory=set)
    elsewhere: list[str] = field(default_factory=list)
    """Modules that only other stages hold."""

    def describe(self, fails: Collection[str], *, is_proven: bool) -> str:
        """Return the note for the record.

        Args:
            fails: modules that do not fit on some stage.
            is_proven: there was a batch to run again.
        """
        others = sorted(set(self.elsewhere) - set(fails))
        proof = (
            "proven on the step's batch"
            if is_proven
            else "not proven and not judged: there is no batch to run again"
        )
        carried = [f"carried out by other stages: {', '.join(others)}"] if others else []
        left_out = (f"left out: {error.reason}" for error in self.refused)
        return "; ".join([*carried, *reversed(self.notes), proof, *left_out])


class ScoreClip(HeldEffect):
    """Scores of heads clipped to their targets by scaling query and key weights.

    Which rows make a head's queries and keys is proven by replaying the step's batch, where that is
    possible. A module that attends several times in a forward (``name#1`` …) is one module here.

    Args:
        run: the run.
        targets: the largest allowed score of each (layer, head).
        limits: the score up to which :meth:`relax` may raise a target; the target where missing.
        ceiling: targets hold for the largest scores of the newest steps, and not of one batch.
    """

    def __init__(
        self,
        run: TrainingRun,
        targets: dict[Place, float],
        limits: Mapping[Place, float] | None = None,
        *,
        ceiling: bool = False,
    ) -> None:
        super().__init__(
            places=list(targets),
            resources=frozenset(f"scores of {module_name(layer)}" for layer, _ in targets),
        )
        self.run, self.targets, self.limits = run, targets, dict(limits or {})
        self.first_targets = dict(targets)
        """The targets before any was raised."""
        self.steps: UpdateCap | None = None
        """The ceiling on what a step changes of the held layers, while it is held."""
        self.rates: FittingRate | None = None
        """The ceilings on the rates of the whole model, while they are held."""
        self._since_relaxed: dict[Place, float] = {}
        """Product of each place's factors since targets were last raised, or not."""
        self.proven: dict[str, str] = {}
        """Description of the proposal that was proven in each module."""
        self.rows = ScaledRows(run)
        self._step_scores = StepScores(run)
        self._unproven: dict[str, UnprovenRows] = {}
        """Modules clipped without a proof, until their scores have fallen."""
        self._recent = RecentScores() if ceiling else None
        """The scores of the newest steps, where ``ceiling`` is set."""
        self._parts: dict[str, QueryKey] = {}
        """Rows taken for each module's queries and keys."""
        self._report = ClipReport(run)
        self._reset: OptimizerReset | None = None

    def clip_now(
        self,
        fresh: Mapping[Place, float] | None = None,
        *,
        named: Collection[Place] | None = None,
        wait: bool = False,
        idle: bool = False,
    ) -> None:
        """Clip each head above its target; leave out modules that do not fit.

        The deepest module comes first: its clip does not change the inputs of the others, so that
        one measurement serves all. Heads below their targets are held where another head of their
        module is clipped.

        Args:
            fresh: other targets for this clip alone, by (layer, head).
            named: places of which one must be above its target; None for any.
            wait: hold also modules with no head above its target.
            idle: hold them even if no head is above its target yet.

        Raises:
            NotApplicable: if there is nothing to clip, or no module fits.
        """
        measured = replayed_scores(self.run)
        scores = self._known_scores(measured)
        now = {**self.targets, **(fresh or {})}
        todo = head_factors(scores, now)
        first = {place: now[place] for place in (now if named is None else named)}
        modules = list(dict.fromkeys(map(module_name, layers_of(self.targets))))
        waiting = [name for name in modules if name not in todo] if wait else []
        if not (idle and waiting) and not head_factors(scores, first):
            raise NotApplicable(
                "every head named is at or below its target already, or its score is not finite: "
                "there is nothing to clip"
            )
        tried = self._try_modules([*todo, *waiting], todo, measured, scores)
        fails = self._agreed_failures(tried.fails, sorted({*todo, *waiting}))
        todo = {name: factors for name, factors in todo.items() if name not in fails}
        waiting = [name for name in waiting if name not in fails]
        if not any(module_name(layer) in (*todo, *waiting) for layer, _ in first):
            refused = tried.refused or [NotApplicable("it does not fit on another stage")]
            raise refused[0]
        self.targets = {
            (layer, head): target
            for (layer, head), target in self.targets.items()
            if module_name(layer) in (*todo, *waiting)
        }
        self.places = [(name, head) for name, factors in todo.items() for head in factors]
        self.places += [
            (layer, head) for layer, head in self.targets if module_name(layer) in waiting
        ]
        self.before, self.after = before_and_after(self.targets, todo, scores)
        self.note = tried.describe(fails, is_proven=bool(measured))

    def reset_optimizer(self, first: int | None = None) -> None:
        """Reset the optimizer's moments and warm it up, for heads that start again.

        Args:
            first: the step of the reset, after a restart; None to reset now.
        """
        self._reset = OptimizerReset(self.run, first)
        self.note += f"; the optimizer begins anew, with a warm-up of {self._reset.steps} steps"

    def watch(
        self,
        hold: bool,
        step_share: float | None = None,
        model_share: float | None = None,
        caps: Mapping[str, float] | None = None,
    ) -> None:
        """Add the hooks at each step from now on.

        Args:
            hold: measure every training forward, to clip again and to judge unproven rows.
            step_share: largest share of the layers' W_q and W_k that a step may change.
            model_share: share of the whole model that a step may change, see
                :class:`~stabmon.interventions.effects.fitting_rate.FittingRate`.
            caps: the ceilings on rates that were held before a restart.
        """
        self._report.start()
        looking = [self.run.step_hooks.add("attention", self._record_scores)] if hold else []
        self._remove = [self.run.step_hooks.add("on_step", self._on_step), *looking]
        if hold and step_share is not None:
            modules = dict.fromkeys(map(module_name, layers_of(self.targets)), step_share)
            try:
                self.steps = UpdateCap(self.run, modules, None)
            except NotApplicable as error:
                self.note += f"; steps have no limit: {error.reason}"
        if hold and model_share is not None:
            try:
                self.rates = FittingRate(self.run, model_share, caps)
            except NotApplicable as error:
                self.note += f"; rates have no limit: {error.reason}"

    def undo(self) -> bool:
        self.release()
        if self._reset is not None:
            self._reset.undo()
        return self.rows.undo()

    def was_active(self) -> bool:
        held = [each.was_active() for each in (self.steps, self.rates) if each is not None]
        return super().was_active() or any(held)

    def relax(self) -> Mapping[str, Any]:
        """Double the targets of heads that were clipped, unless some head still runs away.

        A head runs away that would have doubled its score since the last time.
        """
        factors, self._since_relaxed = self._since_relaxed, {}
        if min(factors.values(), default=1.0) <= 1 / 2:
            return {}
        known = {
            place: min(2 * self.targets[place], self.limits.get(place, self.targets[place]))
            for place in factors
            if place in self.targets
        }
        wider = {place: target for place, target in known.items() if target > self.targets[place]}
        self.targets |= wider
        return (
            {"max_logit": {f"{layer} head {head}": value for (layer, head), value in wider.items()}}
            if wider
            else {}
        )

    def rolled_back(self, step: int) -> Callable[[], None]:
        return self.rows.rolled_back(step)

    def release(self) -> None:
        for each in (self._reset, self.steps, self.rates):
            if each is not None:
                each.release()
        super().release()
        self._report.write()

    def state_dict(self) -> dict[str, Any]:
        names = {id(p): name for name, p in self.run.model.named_parameters()}
        targets = [[layer, head, target] for (layer, head), target in self.targets.items()]
        limits = [[layer, head, limit] for (layer, head), limit in self.limits.items()]
        anew = None if self._reset is None else self._reset.first
        return {
            "aims": targets,
            "limits": limits,
            "anew": anew,
            "first": [[layer, head, aim] for (layer, head), aim in self.first_targets.items()],
            "proven": dict(self.proven),
            "rows": self.rows.state(names),
            "rates": {} if self.rates is None else self.rates.state_dict(),
        }

    def _known_scores(self, measured: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the largest scores of each layer's heads: as replayed, or last read."""
        here = [
            layer for layer in layers_of(self.targets) if not self.run.share.is_elsewhere(layer)
        ]
        known = {
            layer: measured[layer] if layer in measured else self._last_read(layer)
            for layer in here
        }
        return self._step_scores.agreed(known, self.targets)

    def _try_modules(
        self,
        names: Sequence[str],
        todo: Mapping[str, dict[int, float]],
        measured: Mapping[str, np.ndarray],
        scores: Mapping[str, np.ndarray],
    ) -> _Tried:
        """Clip the modules of ``todo`` and find the rows of the others, the deepest first."""
        tried = _Tried()
        for name in deepest_first(list(names), list(measured)):
            if self.run.share.is_elsewhere(name):
                tried.elsewhere.append(name)
                continue
            try:
                found = (
                    self._apply(name, todo[name], measured, scores)
                    if name in todo
                    else self._find_proposal(name, measured)
                )
            except NotApplicable as error:
                tried.refused.append(error.with_traceback(None))
                tried.fails.add(name)
                continue
            alike = ", all heads scaled alike" if found.shared else ""
            tried.notes.append(f"{name}: {found.how}{alike}")
        return tried

    def _last_read(self, layer: str) -> np.ndarray:
        history = self.run.history
        if not len(history) or layer not in history.layers:
            raise NotApplicable(f"the scores of {layer} are not known")
        values: np.ndarray = history.now("max_logit")[history.of_layer(layer)]
        return values

    def _apply(
        self,
        name: str,
        factors: dict[int, float],
        measured: Mapping[str, np.ndarray],
        scores: Mapping[str, np.ndarray],
    ) -> QueryKey:
        """Scale by the first proposal that proves right on the replayed scores."""
        proposals = find_query_key(self.run.module(name), self.run.history.info.get(name))
        known = [each for each in proposals if each.how == self.proven.get(name)]
        if known or name not in measured:
            chosen = (known or proposals)[0]
            if not known:
                rows = [rows for rows, _ in chosen.edits(factors)]
                self._unproven[name] = UnprovenRows(
                    self.run, rows, module_scores(name, self.targets, scores)
                )
            self.rows.scale(chosen.edits(factors))
            self.proven[name], self._parts[name] = chosen.how, chosen
            return chosen
        proposal = self._prove(name, proposals, factors, measured[name])
        self.rows.scale(proposal.edits(factors))
        return proposal

    def _prove(
        self,
        name: str,
        proposals: Sequence[QueryKey],
        factors: Mapping[int, float],
        before: np.ndarray,
    ) -> QueryKey:
        proven = proven_rows(self.run, name, proposals, factors, before)
        self.proven[name], self._parts[name] = proven.how, proven
        return proven

    def _find_proposal(self, name: str, measured: Mapping[str, np.ndarray]) -> QueryKey:
        """Return the right proposal for a module with nothing to clip yet; change nothing."""
        proposals = find_query_key(self.run.module(name), self.run.history.info.get(name))
        if name not in measured:
            return proposals[0]
        heads = [
            head for layer, head in self.targets if module_name(layer) == name and head is not None
        ]
        return self._prove(name, proposals, dict.fromkeys(heads, 0.5), measured[name])

    def _record_scores(self, call: AttentionCall) -> None:
        if any(call.layer == layer for layer, _ in self.targets):
            own = self.run.share.own(call.layer) or call.layer
            scores = self.run.share.spread(own, largest_scores(call))
            self._step_scores.note(call.layer, scores)
            if self._recent is not None and module_name(call.layer) in self._parts:
                self._recent.note_weights(call.layer, self._parts[module_name(call.layer)])

    def _on_step(self) -> None:
        """Clip heads again that were above their targets in this step's forwards."""
        self.rows.moved_on()
        if self._reset is not None:
            self._reset.moved_on()
        if self.run.ranks == 1 and not self.run.step_hooks.wants("attention"):
            return  # with others, what they have seen counts here as well
        scores = self._step_scores.take(self.targets)
        ineffective = {
            name
            for name, each in list(self._unproven.items())
            if self._is_ineffective(name, each, scores)
        }
        if self._recent is not None:
            parts = {
                layer: self._parts[module_name(layer)]
                for layer in scores
                if module_name(layer) in self._parts
            }
            scores = self._recent.add(scores, parts)
        todo = head_factors(scores, self.targets)
        if todo:
            self.run.note_edit()
        for name, factors in todo.items():
            if name in ineffective or self.abandoned_reason:
                continue
            if not self.run.share.is_elsewhere(name):
                self._apply(name, factors, {}, scores)
            for head, factor in factors.items():
                self._report.note(name, head, factor)
                self._note_factor(name, head, factor)
                self._bound = True
        self._report.end_step()

    def _note_factor(self, name: str, head: int, factor: float) -> None:
        """Add a clip of a module's head to the products by which targets are raised."""
        for place in self.targets:
            if place[1] == head and module_name(place[0]) == name:
                self._since_relaxed[place] = self._since_relaxed.get(place, 1.0) * factor

    def _agreed_failures(self, own: set[str], names: Sequence[str]) -> set[str]:
        """Return the modules that do not fit on the stage that holds them."""
        if not self.run.share.is_staged or not names:
            return own
        flags = torch.tensor([float(name in own) for name in names])
        failed = self.run.largest_over_ranks(flags).tolist()
        return {name for name, flag in zip(names, failed, strict=True) if flag}

    def _is_ineffective(
        self, name: str, clipped: UnprovenRows, scores: Mapping[str, np.ndarray]
    ) -> bool:
        """Return whether unproven rows have shrunk while their scores stayed.

        They are then not clipped further; if that still holds some forwards later, the clip is
        abandoned.
        """
        verdict = clipped.judge(module_scores(name, self.targets, scores))
        if verdict == "fell":
            del self._unproven[name]
        if verdict == "ineffective":
            self.abandoned_reason = (
                f"the rows scaled in {name} are not those of its heads: they have "
                "shrunk and the scores have not fallen"
            )
        return verdict in ("ineffective", "doubtful")
