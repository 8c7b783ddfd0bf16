"""One leaf of each kind, as a package that knows only the public base classes writes them."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import torch
from torch import Tensor

from stabmon.analysis.kv_cache.policy import Policy
from stabmon.analysis.kv_cache.prompt import PromptLayer
from stabmon.controllers import Controller
from stabmon.interventions import Intervention, NotApplicable, TrainingRun, intervention
from stabmon.interventions.effects.effect import Effect
from stabmon.operator import AttentionOperator
from stabmon.records import Reading, StabilityIssue
from stabmon.rules import History, Rule
from stabmon.rules.symptoms import Symptom
from stabmon.signals import signal
from stabmon.sinks import Sink

PEAKED = Symptom("peaked_attention", "flatten the layer by hand", order=5)


@signal(unit="probability", reduction="mean", needs=("collision",))
def peak_share(operator: AttentionOperator) -> Tensor:
    """Sum of the squared attention weights of a row.

    Returns:
        ``[B, H, Q]`` in (0, 1].
    """
    return operator.collision()


@dataclass(frozen=True)
class Peaked(Rule):
    """The rows of a layer attend to hardly more than one key."""

    symptom: ClassVar[Symptom] = PEAKED

    above: float = 0.9

    def check(self, history: History) -> Iterable[StabilityIssue]:
        """Return an issue for each layer whose mean share is above the level."""
        shares = history.now("peak_share")
        for layer in history.layers:
            share = float(shares[history.of_layer(layer)].mean())
            if share > self.above:
                yield StabilityIssue(
                    *(history.latest.step, layer, None, "peaked", "error", share, self.above),
                    suggestion="Flatten the layer.",
                )


@intervention
@dataclass(frozen=True)
class Flatten(Intervention):
    """Multiply W_q of the layers by a factor."""

    treats: ClassVar[Mapping[str, int]] = {PEAKED.name: 0}

    factor: float = 2.0**-12

    def _start(self, run: TrainingRun) -> Effect:
        layers = [issue.layer for issue in self.issues if issue.layer is not None]
        if not layers:
            raise NotApplicable("no layer is named")
        effect = Flattened(run, layers, self.factor)
        effect.multiply(self.factor)
        return effect

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        return Flattened(run, state["layers"], self.factor)


class Flattened(Effect):
    """Layers whose W_q was multiplied."""

    def __init__(self, run: TrainingRun, layers: Sequence[str], factor: float) -> None:
        super().__init__(
            places=[(layer, None) for layer in layers],
            before={"factor": 1.0},
            after={"factor": factor},
            resources=frozenset(f"weights of {layer}" for layer in layers),
        )
        self.run, self.layers, self.factor = run, list(layers), factor

    def multiply(self, factor: float) -> None:
        with torch.no_grad():
            for layer in self.layers:
                weight = self.run.module(layer).c_attn.weight
                weight[:, : weight.shape[1] // 3] *= factor

    def undo(self) -> bool:
        self.multiply(1 / self.factor)
        return True

    def state_dict(self) -> dict[str, Any]:
        return {"layers": self.layers}


class TallySink(Sink):
    """Writes a line for each record."""

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        assert run_dir is not None
        self.path = run_dir / "tally.jsonl"

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self._write("reading", reading.step)

    def write_issue(self, issue: StabilityIssue) -> None:
        self._write(f"issue {issue.issue_type}", issue.step)

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        self._write(f"{record['action']} {record['intervention']}", record["step"])

    def _write(self, kind: str, step: int) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps([kind, step]) + "\n")


class Steady(Controller):
    """Multiplies every score of a query by one half."""

    def query_gain(self, hidden: Tensor) -> Tensor:
        return hidden.new_full((len(hidden), self.site.heads, hidden.shape[1]), 0.5)


@dataclass(frozen=True)
class Oldest(Policy):
    """Keep the oldest keys."""

    name: ClassVar[str] = "oldest"

    def scores(self, layer: PromptLayer) -> Tensor:
        return -layer.valid.cumsum(1)[:, None].repeat(1, layer.key_heads, 1).float()
