"""Attention patterns over the checkpoints of a run, and over its stored readings."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor, nn

from stabmon.analysis.patterns.api import attention_patterns
from stabmon.analysis.patterns.checkpoints import read_checkpoint, restored, step_of
from stabmon.analysis.record import AnalysisRecord
from stabmon.records import Reading


@dataclass(frozen=True, eq=False)
class PatternEvolution:
    """Statistics over T steps; B samples, H query heads, K keys at most.

    Attributes:
        over: ``checkpoints``, ``generation`` or ``training`` (stored readings).
        steps: number of each step: a checkpoint's training step; in generation 0 is the prompt,
            whose last query makes the first new token.
        statistics: ``[layer][name]`` ``[T, B, H]`` float64 of the chosen query (in generation the
            newest token); see :class:`AttentionPatterns`.
        over_queries: the same, means over all valid queries; empty for generation.
        rows: layer -> ``[T, B, K]`` float32, head mean of the query's weights; NaN for keys missing
            at a step. Empty for stored readings.
        roles: for each checkpoint [layer, head, role].
        tokens: in generation ``[B, S]`` ids of prompt and new tokens.
        notes: omissions and their reasons.

    Example:
        >>> statistics = {"h.0": {"entropy": np.ones((1, 1, 2))}}
        >>> PatternEvolution("training", (0,), statistics).to_record().kind
        'evolution'
    """

    over: str
    steps: tuple[int, ...]
    statistics: dict[str, dict[str, np.ndarray]]
    over_queries: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    rows: dict[str, np.ndarray] = field(default_factory=dict)
    roles: list[list[tuple[str, int, str]]] = field(default_factory=list)
    tokens: np.ndarray | None = None
    notes: list[str] = field(default_factory=list)

    def to_record(self) -> AnalysisRecord:
        """Return a record of kind ``evolution``.

        Values: ``over``, ``steps``, ``layers``, ``names`` and ``over_queries_names`` (along the
        first axis of those arrays), ``roles`` (a step: [[layer, head, role], …]), ``notes``.
        Arrays: ``statistics/<layer>`` ``[N, T, B, H]``, ``over_queries/<layer>``
        ``[M, T, B, H]``, ``rows/<layer>`` ``[T, B, K]``, ``tokens`` ``[B, S]`` where known.
        """
        first = next(iter(self.statistics.values()))
        over = list(next(iter(self.over_queries.values()), {}))
        values: dict[str, Any] = {
            "over": self.over,
            "steps": list(self.steps),
            "layers": list(self.statistics),
            "names": list(first),
            "over_queries_names": over,
            "roles": [[list(role) for role in roles] for roles in self.roles],
            "notes": list(self.notes),
        }
        arrays = {
            f"statistics/{layer}": np.stack([stats[name] for name in first])
            for layer, stats in self.statistics.items()
        }
        for layer, means in self.over_queries.items():
            arrays[f"over_queries/{layer}"] = np.stack([means[name] for name in over])
        arrays |= {f"rows/{layer}": rows for layer, rows in self.rows.items()}
        if self.tokens is not None:
            arrays["tokens"] = self.tokens
        return AnalysisRecord("evolution", values, arrays)


Checkpoint = nn.Module | Mapping[str, Tensor] | str | Path


def patterns_over_checkpoints(
    model: nn.Module,
    checkpoints: Mapping[int, Checkpoint] | Iterable[Checkpoint | tuple[int, Checkpoint]],
    batch: Any,
    *,
    query: int = -1,
    attention_layer_pattern: str | None = None,
) -> PatternEvolution:
    """Measure the patterns of a batch at each checkpoint of a model.

    Args:
        model: the model that takes the weights; its own are restored afterwards.
        checkpoints: state dicts, models, files (safetensors, or ``torch.load`` without code) or
            folders written by ``save_pretrained`` or a Trainer; with their steps as a mapping or
            as pairs, else with the last number in a path's name, else counted from 0.
        batch: the input of its forward.
        query: index of the query among each sample's own tokens.
        attention_layer_pattern: regular expression that a layer's name must contain.

    Returns:
        The patterns step by step.

    Raises:
        ValueError: if there are no checkpoints, or one cannot be read or does not fit.

    Example:
        >>> import torch
        >>> layer = nn.TransformerEncoderLayer(8, 2, batch_first=True)
        >>> state = {name: 2 * weight for name, weight in layer.state_dict().items()}
        >>> x = torch.randn(1, 6, 8)
        >>> found = patterns_over_checkpoints(layer, {0: layer, 100: state}, x)
        >>> found.steps, found.statistics["self_attn"]["entropy"].shape
        ((0, 100), (2, 1, 2))
    """
    pairs = checkpoints.items() if isinstance(checkpoints, Mapping) else checkpoints
    steps: list[int] = []
    found: list[Any] = []
    with restored(model) as reset:
        for index, each in enumerate(pairs):
            step, checkpoint = each if isinstance(each, tuple) else (step_of(each, index), each)
            chosen = model
            if checkpoint is model:
                reset()
            elif isinstance(checkpoint, nn.Module):
                chosen = checkpoint
            else:
                read_checkpoint(model, checkpoint)
            steps.append(step)
            found.append(
                attention_patterns(
                    chosen,
                    batch,
                    query=query,
                    attention_layer_pattern=attention_layer_pattern,
                    similarity=False,
                    advice=False,
                )
            )
    if not found:
        raise ValueError("no checkpoints: give at least one state dict, model, file or folder")
    layers = found[0].layers
    if odd := [step for step, each in zip(steps, found, strict=True) if each.layers != layers]:
        raise ValueError(f"the checkpoint of step {odd[0]} attends in other layers than the first")
    return PatternEvolution(
        "checkpoints",
        tuple(steps),
        {n: stacked([each.statistics[n] for each in found]) for n in layers},
        {n: stacked([each.over_queries[n] for each in found]) for n in layers},
        {n: np.stack([each.rows[n].mean(1) for each in found]) for n in layers},
        [[(role.layer, role.head, role.role) for role in each.roles] for each in found],
    )


def patterns_over_training(readings: Sequence[Reading]) -> PatternEvolution:
    """Arrange the stored readings of a run as an evolution of their signals.

    Args:
        readings: such as ``stabmon.read_records(run_dir).readings``.

    Returns:
        Every signal as a statistic ``[T, 1, H]``; NaN at steps without it.

    Raises:
        ValueError: if there are no readings.

    Example:
        >>> readings = [Reading(step, None, {"h.0": {"entropy": np.ones(2)}}) for step in (0, 50)]
        >>> found = patterns_over_training(readings)
        >>> found.steps, found.statistics["h.0"]["entropy"].shape
        ((0, 50), (2, 1, 2))
    """
    if not readings:
        raise ValueError("no readings: give stabmon.read_records(run_dir).readings of a run")
    sizes: dict[tuple[str, str], int] = {}
    for reading in readings:
        for layer, signals in reading.layers.items():
            sizes |= {(layer, name): len(values) for name, values in signals.items()}
    names = list(dict.fromkeys(name for _, name in sizes))
    statistics: dict[str, dict[str, np.ndarray]] = {}
    for layer in dict.fromkeys(layer for layer, _ in sizes):
        heads = max(size for (of, _), size in sizes.items() if of == layer)
        missing = np.full(heads, np.nan)
        statistics[layer] = {
            name: np.stack([r.layers.get(layer, {}).get(name, missing) for r in readings])[:, None]
            for name in names
        }
    return PatternEvolution("training", tuple(r.step for r in readings), statistics)


def stacked(steps: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Stack the statistics of several steps, ``[T, ...]`` each."""
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}
