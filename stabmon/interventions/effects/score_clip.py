"""Heads whose scores are clipped by way of their weights, each guess of the rows proven, and kept
at or below their targets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabmon._torch.snippets import QK_NORM
from stabmon.interventions.effects.effect import HeldEffect, Place
from stabmon.interventions.effects.unproven_rows import Unproven
from stabmon.interventions.run.optimizer_reset import OptimizerReset
from stabmon.interventions.run.recent_scores import RecentScores
from stabmon.interventions.run.score_replay import deepest_first, largest_scores, replayed_scores
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.projections.head_rows import QueryKey
from stabmon.projections.locate import find_query_key
from stabmon.projections.not_applicable import NotApplicable
from stabmon.projections.scaling import ScaledRows
from stabmon.records import AttentionCall


class ScoreClip(HeldEffect):
    """Heads held at or below their targets. A module that attends several times in a forward
    (``name#1`` …) is one module here.
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
            resources=frozenset(f"scores of {_module(layer)}" for layer, _ in targets),
        )
        self.run, self.targets, self.limits = run, targets, dict(limits or {})
        self.proven: dict[str, str] = {}
        """The proposal that holds in each module, by its words."""
        self.rows = ScaledRows(run)
        self._seen: dict[str, Tensor] = {}
        self._unproven: dict[str, Unproven] = {}
        """Modules clipped without a proof, until their scores have fallen."""
        self._recent = RecentScores() if ceiling else None
        """Where the targets are not to be exceeded by one batch because they were met on another."""
        self._parts: dict[str, QueryKey] = {}
        """What was taken for a module's queries and keys."""
        self._again: dict[tuple[str, int], list[float]] = {}
        """Factors of the clips that have not been told of yet."""
        self._told_at: int | None = None
        self._anew: OptimizerReset | None = None

    def first(self, fresh: Mapping[Place, float] | None = None, *, wait: bool = False) -> None:
        """Clip each head that is above its aim, prove it where that can be, and describe it. What
        does not fit is left out.

        Heads in ``fresh`` are brought to what it gives, now and not again. The deepest module comes
        first: its clip does not change what the others see, so that one measurement serves all.
        Heads below their targets are kept to be held later where one is clipped in their module, and
        everywhere if ``wait``.
        """
        measured = replayed_scores(self.run)
        scores = self._largest(
            {
                layer: measured[layer] if layer in measured else self._last_read(layer)
                for layer in self._layers()
            }
        )
        todo = self._factors(scores, {**self.targets, **(fresh or {})})
        waiting = (
            [_module(layer) for layer in self._layers() if _module(layer) not in todo]
            if wait
            else []
        )
        if not todo and not waiting:
            raise NotApplicable(
                "every head named is at or below its aim already, or its score is not finite: "
                "there is nothing to clip"
            )
        refused: list[NotApplicable] = []
        notes = []
        for name in deepest_first([*todo, *dict.fromkeys(waiting)], list(measured)):
            try:
                found = (
                    self._apply(name, todo[name], measured, scores)
                    if name in todo
                    else self._ready(name, measured)
                )
            except NotApplicable as error:
                refused.append(error)
                todo.pop(name, None)
                waiting = [each for each in waiting if each != name]
                continue
            notes.append(
                f"{name}: {found.how}" + (", all heads scaled alike" if found.shared else "")
            )
        if not todo and not waiting:
            raise refused[0]
        self.targets = {
            (layer, head): aim
            for (layer, head), aim in self.targets.items()
            if _module(layer) in (*todo, *waiting)
        }
        self.places = [(name, head) for name, factors in todo.items() for head in factors]
        self.places += [(layer, head) for layer, head in self.targets if _module(layer) in waiting]
        self.before, self.after = self._describe(todo, scores)
        proof = (
            "proven on the step's batch"
            if measured
            else "not proven and not judged: there is no batch to run again"
        )
        self.note = "; ".join(
            [*reversed(notes), proof, *(f"left out: {error.reason}" for error in refused)]
        )

    def begin_anew(self, first: int | None = None) -> None:
        """Let the optimizer begin anew with these heads; ``first`` is the step at which it did,
        after a restart.
        """
        self._anew = OptimizerReset(self.run, first)
        self.note += f"; the optimizer begins anew, with a warm-up of {self._anew.steps} steps"

    def watch(self, hold: bool) -> None:
        """Look at every training forward from now on, as long as there is something to prove or to
        hold.
        """
        self._told_at = self.run.history.latest.step if len(self.run.history) else None
        looking = [self.run.step_hooks.add("attention", self._look)] if hold else []
        self._remove = [self.run.step_hooks.add("on_step", self._on_step), *looking]

    def undo(self) -> bool:
        self.release()
        if self._anew is not None:
            self._anew.undo()
        return self.rows.undo()

    def relax(self) -> Mapping[str, Any]:
        known = {
            place: min(2 * aim, self.limits.get(place, aim)) for place, aim in self.targets.items()
        }
        wider = {place: aim for place, aim in known.items() if aim > self.targets[place]}
        self.targets |= wider
        return (
            {"max_logit": {f"{layer} head {head}": aim for (layer, head), aim in wider.items()}}
            if wider
            else {}
        )

    def rolled_back(self, step: int) -> Callable[[], None]:
        return self.rows.rolled_back(step)

    def release(self) -> None:
        self._tell_again()
        if self._anew is not None:
            self._anew.release()
        super().release()

    def state_dict(self) -> dict[str, Any]:
        names = {id(p): name for name, p in self.run.model.named_parameters()}
        targets = [[layer, head, aim] for (layer, head), aim in self.targets.items()]
        limits = [[layer, head, limit] for (layer, head), limit in self.limits.items()]
        anew = None if self._anew is None else self._anew.first
        return {
            "aims": targets,
            "limits": limits,
            "anew": anew,
            "proven": dict(self.proven),
            "rows": self.rows.state(names),
        }

    def _layers(self) -> list[str]:
        return list(dict.fromkeys(str(layer) for layer, _ in self.targets))

    def _last_read(self, layer: str) -> np.ndarray:
        history = self.run.history
        if not len(history) or layer not in history.layers:
            raise NotApplicable(f"the scores of {layer} are not known")
        values: np.ndarray = history.now("max_logit")[history.of_layer(layer)]
        return values

    def _factors(
        self, scores: Mapping[str, np.ndarray], targets: Mapping[Place, float]
    ) -> dict[str, dict[int, float]]:
        """For each module, the factor of each head that is above its aim; the smallest over a
        module's calls.
        """
        found: dict[str, dict[int, float]] = {}
        for (layer, head), aim in targets.items():
            values = scores.get(str(layer))
            if (
                values is None
                or head is None
                or head >= len(values)
                or not aim < values[head] < np.inf
            ):
                continue
            factors = found.setdefault(_module(layer), {})
            factors[head] = min(factors.get(head, 1.0), aim / float(values[head]))
        return found

    def _apply(
        self,
        name: str,
        factors: dict[int, float],
        measured: Mapping[str, np.ndarray],
        scores: Mapping[str, np.ndarray],
    ) -> QueryKey:
        """Scale by the first proposal that proves right on what was ``measured``; every other one
        is taken back.
        """
        proposals = find_query_key(self.run.module(name), self.run.history.info.get(name))
        known = [each for each in proposals if each.how == self.proven.get(name)]
        if known or name not in measured:
            chosen = (known or proposals)[0]
            if not known:
                rows = [rows for rows, _ in chosen.edits(factors)]
                self._unproven[name] = Unproven(self.run, rows, self._of_module(name, scores))
            self.rows.scale(chosen.edits(factors))
            self.proven[name], self._parts[name] = chosen.how, chosen
            return chosen
        proposal = self._prove(name, proposals, factors, measured[name])
        self.rows.scale(proposal.edits(factors))
        return proposal

    def _ready(self, name: str, measured: Mapping[str, np.ndarray]) -> QueryKey:
        """Find the proposal that is right for a module with nothing to clip yet; nothing is
        changed.
        """
        proposals = find_query_key(self.run.module(name), self.run.history.info.get(name))
        if name not in measured:
            return proposals[0]
        heads = [
            head for layer, head in self.targets if _module(layer) == name and head is not None
        ]
        return self._prove(name, proposals, dict.fromkeys(heads, 0.5), measured[name])

    def _prove(
        self,
        name: str,
        proposals: Sequence[QueryKey],
        factors: dict[int, float],
        before: np.ndarray,
    ) -> QueryKey:
        """The first proposal that does to the scores what it promises; all is as it was after the
        trial.
        """
        failures = []
        for proposal in proposals:
            trial = ScaledRows(self.run)
            trial.scale(proposal.edits(factors))
            try:
                after = replayed_scores(self.run)[name]
            finally:
                trial.undo()
            wrong = _difference(factors, before, after, self._tolerance(name), proposal.shared)
            if not wrong:
                self.proven[name], self._parts[name] = proposal.how, proposal
                return proposal
            failures.append(f"{proposal.how}: {wrong}")
        raise NotApplicable(
            f"scaling weights does not scale the scores of {name} ({'; '.join(failures)})", QK_NORM
        )

    def _tolerance(self, name: str) -> float:
        weight = next(iter(self.run.module(name).parameters()), None)
        return 0.01 if weight is None or weight.dtype in (torch.float32, torch.float64) else 0.03

    def _look(self, call: AttentionCall) -> None:
        if any(call.layer == layer for layer, _ in self.targets):
            scores = largest_scores(call)
            known = self._seen.get(call.layer)
            self._seen[call.layer] = scores if known is None else torch.maximum(known, scores)
            if self._recent is not None and _module(call.layer) in self._parts:
                self._recent.look(call.layer, self._parts[_module(call.layer)])

    def _on_step(self) -> None:
        """After the optimizer's step: clip again what was above its aim in this step's forwards."""
        self.rows.moved_on()
        if self._anew is not None:
            self._anew.moved_on()
        if not self.run.step_hooks.wants("attention"):
            return
        scores = self._over_ranks()
        vain = {
            name
            for name, each in list(self._unproven.items())
            if self._is_in_vain(name, each, scores)
        }
        if self._recent is not None:
            parts = {
                layer: self._parts[_module(layer)]
                for layer in scores
                if _module(layer) in self._parts
            }
            scores = self._recent.add(scores, parts)
        for name, factors in self._factors(scores, self.targets).items():
            if name in vain or self.given_up:
                continue
            self._apply(name, factors, {}, scores)
            for head, factor in factors.items():
                self._again.setdefault((name, head), []).append(factor)
                self._bound = True
        latest = self.run.history.latest.step if len(self.run.history) else None
        if latest != self._told_at:
            self._told_at = latest
            self._tell_again()

    def _tell_again(self) -> None:
        """Put the clips since the last sampled step into one audit record."""
        if not self._again:
            return
        self.run.audit(
            {
                "intervention": "qk_clip",
                "action": "again",
                "step": self.run.step,
                "layer": None,
                "head": None,
                "places": [list(place) for place in self._again],
                "before": {},
                "after": {
                    "clips": {
                        f"{n} head {h}": len(factors) for (n, h), factors in self._again.items()
                    }
                }
                | {
                    "factor": {
                        f"{n} head {h}": math.prod(factors)
                        for (n, h), factors in self._again.items()
                    }
                },
                "why": "scores rose above their aim again",
            }
        )
        self._again = {}

    def _largest(self, own: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Each rank replays its own batch; all must scale by the same."""
        if self.run.ranks == 1:
            return dict(own)
        device = next(self.run.model.parameters()).device
        self._seen = {
            layer: torch.tensor(scores, dtype=torch.float32, device=device)
            for layer, scores in own.items()
        }
        return self._over_ranks()

    def _over_ranks(self) -> dict[str, np.ndarray]:
        """The largest scores seen by layer, over micro-batches and ranks, in one transfer."""
        seen, self._seen = self._seen, {}
        layers = sorted(self._layers())
        heads = [
            1 + max(head or 0 for layer, head in self.targets if layer == name) for name in layers
        ]
        device = next((each.device for each in seen.values()), torch.device("cpu"))
        unseen = torch.full((max(heads),), -torch.inf, device=device)
        flat = [
            seen[name][:n].float() if name in seen else unseen[:n]
            for name, n in zip(layers, heads, strict=True)
        ]
        together = self.run.largest_over_ranks(torch.cat(flat)).double().cpu()
        return {
            name: part.numpy() for name, part in zip(layers, together.split(heads), strict=True)
        }

    def _is_in_vain(self, name: str, clipped: Unproven, scores: Mapping[str, np.ndarray]) -> bool:
        """Whether rows that nothing proved have shrunk far and the scores of their heads have not
        fallen.

        They are not clipped further then; if they still have not some forwards later, the clip is
        given up.
        """
        verdict = clipped.judge(self._of_module(name, scores))
        if verdict == "fell":
            del self._unproven[name]
        if verdict == "in vain":
            self.given_up = (
                f"the rows scaled in {name} are not those of its heads: they have "
                "shrunk and the scores have not fallen"
            )
        return verdict in ("in vain", "doubtful")

    def _of_module(self, name: str, scores: Mapping[str, np.ndarray]) -> dict[int, float]:
        """The largest finite score of each head of a module that is held, over the module's
        calls.
        """
        found: dict[int, float] = {}
        for layer, head in self.targets:
            values = scores.get(str(layer), np.array([]))
            if (
                _module(layer) == name
                and head is not None
                and head < len(values)
                and np.isfinite(values[head])
            ):
                found[head] = max(found.get(head, -np.inf), float(values[head]))
        return found

    def _describe(
        self, todo: Mapping[str, Mapping[int, float]], scores: Mapping[str, np.ndarray]
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        """Scores before and after, by place."""
        places = [
            (layer, head) for layer, head in self.targets if head in todo.get(_module(layer), {})
        ]
        before = {
            f"{layer} head {head}": float(scores[str(layer)][head or 0]) for layer, head in places
        }
        after = {
            f"{layer} head {head}": before[f"{layer} head {head}"] * todo[_module(layer)][head or 0]
            for layer, head in places
        }
        return {"max_logit": before}, {"max_logit": after}


def _module(layer: str | None) -> str:
    """The name of the module behind a layer's name, which counts the module's calls."""
    return str(layer).partition("#")[0]


def _difference(
    factors: Mapping[int, float],
    before: np.ndarray,
    after: np.ndarray,
    tolerance: float,
    shared: bool,
) -> str:
    """How a module's scores ``[H]`` differ from what the factors promise; empty where they do
    not.
    """
    factor = np.array(
        [min(factors.values()) if shared else factors.get(head, 1.0) for head in range(len(before))]
    )
    counts = np.isfinite(before)
    error = np.where(
        counts, np.abs(after - factor * before) / np.maximum(np.abs(factor * before), 1e-6), 0.0
    )
    worst = int(np.argmax(np.where(np.isfinite(error), error, np.inf)))
    if error[worst] <= tolerance:
        return ""
    return f"head {worst} came to {after[worst]:.4g} instead of {(factor * before)[worst]:.4g}"
