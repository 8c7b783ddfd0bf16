"""Follow attention patterns over checkpoints of a run, and over the steps of generation."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon.analysis.call_facts import reads_other_sequence
from stabmon.analysis.forward import compiled_pattern, undisturbed
from stabmon.analysis.patterns.api import attention_patterns
from stabmon.analysis.patterns.checkpoints import read_checkpoint, restored, step_of
from stabmon.analysis.patterns.context_rows import (
    first_keys,
    mass_at,
    mean_distance,
    query_statistics,
    visible_keys,
)
from stabmon.analysis.record import AnalysisRecord
from stabmon.analysis.rollout.stacks import CallReader
from stabmon.capture import AttentionCapture
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall, Reading


@dataclass(frozen=True, eq=False)
class PatternEvolution:
    """Statistics over T steps; B samples, H query heads, K keys at most.

    Attributes:
        over: ``checkpoints``, ``generation`` or ``training`` (stored readings).
        steps: number of each step: a checkpoint's training step; in generation 0 is the prompt,
            whose last query makes the first new token.
        statistics: ``[layer][name]`` ``[T, B, H]`` float64, of the query that was asked about (in
            generation of the newest token); see :class:`AttentionPatterns`.
        over_queries: the same of means over all valid queries; empty for generation.
        rows: layer -> ``[T, B, K]`` float32, head mean of the query's weights; NaN where a step
            has no such key. Empty for stored readings.
        roles: of checkpoints, for each step [layer, head, role].
        tokens: of generation, ``[B, S]`` ids of prompt and new tokens.
        notes: what was left out.
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
    """Measure the patterns of a batch at each of several checkpoints of one model.

    Args:
        model: the model that takes the weights; afterwards it has its own back.
        checkpoints: state dicts, models, files (safetensors, or ``torch.load`` without code) or
            folders that ``save_pretrained`` or a Trainer wrote; with their steps as a mapping or
            as pairs, else with the last number in a path's name, else counted from 0.
        batch: what its forward takes.
        query: which of each sample's valid queries is asked about.
        attention_layer_pattern: regular expression that a layer's name must contain.

    Returns:
        The patterns step by step.

    Raises:
        ValueError: if there are no checkpoints, or one cannot be read or does not fit.

    Example:
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
        {n: _stacked([each.statistics[n] for each in found]) for n in layers},
        {n: _stacked([each.over_queries[n] for each in found]) for n in layers},
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
    """
    if not readings:
        raise ValueError("no readings: give those of a run, stabmon.read_records(run_dir).readings")
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


def patterns_over_generation(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    *,
    max_new_tokens: int = 32,
    attention_layer_pattern: str | None = None,
    **generate: Any,
) -> PatternEvolution:
    """Generate, and measure at each step what the newest token attends to.

    Of every forward of ``generate`` the last query's row is taken: of the prompt, and then of each
    new token. Memory grows with steps times keys for one row a layer (the head mean), and with
    steps times heads for the statistics. Layers that do not run at every step (an encoder) are
    left out.

    Args:
        model: a model with ``generate``.
        inputs: its prompt: a mapping such as a tokenizer's, or ids ``[B, S]``; padding stands on
            the left, as generation needs it.
        max_new_tokens: new tokens at most.
        attention_layer_pattern: regular expression that a layer's name must contain.
        generate: further arguments of ``generate``. Sampling draws from the global random state,
            which afterwards is as it was.

    Returns:
        The patterns step by step.

    Raises:
        ValueError: if the model cannot generate, no attention is seen, or no layer matches.
    """
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{type(model).__name__} has no generate: give a language model with one")
    steps: list[dict[str, _Step]] = [{}]
    wanted = compiled_pattern(attention_layer_pattern)
    errors: list[Exception] = []
    seen: list[str] = []
    reader = CallReader(model)

    def look(call: AttentionCall) -> None:
        seen.append(call.layer)
        if wanted is None or wanted.search(call.layer):
            if call.layer in steps[-1]:
                steps.append({})
            steps[-1][call.layer] = _newest(call, reads_other_sequence(call, reader))

    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    capture = AttentionCapture(model, look, on_error=errors.append, always_watch_functions=True)
    with undisturbed(model), torch.no_grad(), capture:
        output = model.generate(**given, max_new_tokens=max_new_tokens, **generate)
    if errors:
        raise errors[0]
    if not seen:
        raise ValueError(f"no attention was found in {type(model).__name__}'s generation")
    layers = [name for name in steps[-1] if all(name in step for step in steps)]
    if not layers:
        names = ", ".join(dict.fromkeys(seen))
        raise ValueError(
            f"attention_layer_pattern {attention_layer_pattern!r} matches none of the layers that "
            f"run at every step: {names}"
        )
    tokens = output if isinstance(output, Tensor) else output.sequences
    dropped = sorted({name for step in steps for name in step} - set(layers))
    notes = []
    if dropped:
        notes.append(f"{len(dropped)} layers do not run at every step, such as {dropped[0]}")
    return PatternEvolution(
        "generation",
        tuple(range(len(steps))),
        {name: _stacked([step[name].statistics for step in steps]) for name in layers},
        rows={name: _padded([step[name].row for step in steps]) for name in layers},
        tokens=tokens.cpu().numpy(),
        notes=notes,
    )


@dataclass(frozen=True, eq=False)
class _Step:
    """The newest query of one call: statistics ``[B, H]`` and head-mean row ``[B, K]``."""

    statistics: dict[str, np.ndarray]
    row: np.ndarray


def _newest(call: AttentionCall, is_cross: bool) -> _Step:
    a = operator_of(call)
    last, everything = slice(a.queries - 1, a.queries), slice(0, a.keys)
    cols, p = a.probabilities_of(last)
    row = torch.zeros(a.batch, a.heads, 1, a.keys, dtype=p.dtype, device=p.device)
    row[..., cols] = p
    visible = visible_keys(a, last, everything)
    context, own = visible, None
    if not is_cross:  # the newest visible key is the query's own
        places = torch.arange(a.keys, device=p.device)
        newest = torch.where(visible, places, -1).amax(-1, keepdim=True)
        context = visible & (places != newest)
        own = newest.amax().reshape(1)
    exact = row if row.device.type == "mps" else row.double()
    found = query_statistics(exact, context)
    found["sink_mass"] = mass_at(exact, first_keys(a), everything)
    found["mean_distance"] = mean_distance(exact, own, everything, is_causal=False)
    numbers = {
        name: value[..., 0].expand(a.batch, a.heads).cpu().double().numpy()
        for name, value in found.items()
    }
    return _Step(numbers, row.mean(1)[:, 0].float().cpu().numpy())


def _stacked(steps: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    return {name: np.stack([step[name] for step in steps]) for name in steps[0]}


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    longest = max(row.shape[-1] for row in rows)
    out = np.full((len(rows), rows[0].shape[0], longest), np.nan, dtype=np.float32)
    for step, row in enumerate(rows):
        out[step, :, : row.shape[-1]] = row
    return out
