"""Attention patterns of the newest token at each step of generation."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from stabmon.analysis.call_facts import reads_other_sequence
from stabmon.analysis.dtypes import sum_dtype
from stabmon.analysis.forward import compiled_pattern, undisturbed
from stabmon.analysis.patterns.context_rows import (
    first_keys,
    mass_at,
    mean_distance,
    query_statistics,
    visible_keys,
)
from stabmon.analysis.patterns.evolution import PatternEvolution, stacked
from stabmon.analysis.rollout.stacks import CallReader
from stabmon.capture import AttentionCapture
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall


def patterns_over_generation(
    model: Any,
    inputs: Mapping[str, Any] | Tensor,
    *,
    max_new_tokens: int = 32,
    attention_layer_pattern: str | None = None,
    **generate: Any,
) -> PatternEvolution:
    """Measure the attention of the newest token at each step of generation.

    Of every forward of ``generate`` the last query's row is taken: of the prompt, and then of each
    new token. Memory grows with steps times keys for one row per layer (the head mean), and with
    steps times heads for the statistics. Layers that do not run at every step (an encoder) are left
    out.

    Args:
        model: a model with ``generate``.
        inputs: its prompt: a mapping such as a tokenizer's, or ids ``[B, S]``; padding on the left,
            as generation needs it.
        max_new_tokens: new tokens at most.
        attention_layer_pattern: regular expression that a layer's name must contain.
        generate: further arguments of ``generate``. Sampling draws from the global random state,
            which afterwards is as it was.

    Returns:
        The patterns step by step.

    Raises:
        ValueError: if the model cannot generate, no attention is found, or no layer matches.

    Example:
        >>> from transformers import GPT2Config, GPT2LMHeadModel
        >>> model = GPT2LMHeadModel(GPT2Config(
        ...     vocab_size=20, n_embd=8, n_layer=1, n_head=2, bos_token_id=1, eos_token_id=None
        ... ))
        >>> found = patterns_over_generation(model, torch.tensor([[3, 4, 5]]), max_new_tokens=3)
        >>> found.steps, found.statistics["transformer.h.0.attn"]["entropy"].shape
        ((0, 1, 2), (3, 1, 2))
    """
    if not callable(getattr(model, "generate", None)):
        raise ValueError(f"{type(model).__name__} has no generate: give a language model with one")
    steps: list[dict[str, _Step]] = [{}]
    wanted = compiled_pattern(attention_layer_pattern)
    errors: list[Exception] = []
    seen: list[str] = []
    reader = CallReader(model)

    def measure(call: AttentionCall) -> None:
        seen.append(call.layer)
        if wanted is None or wanted.search(call.layer):
            if call.layer in steps[-1]:
                steps.append({})
            steps[-1][call.layer] = _newest(call, reads_other_sequence(call, reader))

    given = {"input_ids": inputs} if isinstance(inputs, Tensor) else dict(inputs)
    capture = AttentionCapture(model, measure, on_error=errors.append, always_watch_functions=True)
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
        {name: stacked([step[name].statistics for step in steps]) for name in layers},
        rows={name: _padded([step[name].row for step in steps]) for name in layers},
        tokens=tokens.cpu().numpy(),
        notes=notes,
    )


@dataclass(frozen=True, eq=False)
class _Step:
    """Newest query of one call: statistics ``[B, H]`` and head-mean row ``[B, K]``."""

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
    exact = row.to(sum_dtype(row))
    found = query_statistics(exact, context)
    found["sink_mass"] = mass_at(exact, first_keys(a), everything)
    found["mean_distance"] = mean_distance(exact, own, everything, is_causal=False)
    numbers = {
        name: value[..., 0].expand(a.batch, a.heads).cpu().double().numpy()
        for name, value in found.items()
    }
    return _Step(numbers, row.mean(1)[:, 0].float().cpu().numpy())


def _padded(rows: list[np.ndarray]) -> np.ndarray:
    longest = max(row.shape[-1] for row in rows)
    out = np.full((len(rows), rows[0].shape[0], longest), np.nan, dtype=np.float32)
    for step, row in enumerate(rows):
        out[step, :, : row.shape[-1]] = row
    return out
