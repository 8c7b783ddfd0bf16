"""A short forward of the model: its layers, its speed, and selections among them."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import run_model
from stabmon.cli.analyzing.inputs import Inputs
from stabmon.cli.analyzing.options import AnalyzeOptions
from stabmon.cli.analyzing.parsing import parsed_numbers
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall


@dataclass(frozen=True)
class Layers:
    """Layers seen in a short forward, and its time."""

    heads: dict[str, int]
    """Layer -> number of query heads, in the order of the forward."""
    seconds: float
    """Time of a forward on ``tokens`` tokens of one sample."""
    tokens: int


def probe(model: nn.Module, inputs: Inputs, kind: str) -> Layers:
    """List a model's layers and time it, by two forwards on a little of the first sample.

    Args:
        model: the model.
        inputs: its batch.
        kind: of the analysis.

    Returns:
        The layers.

    Raises:
        ValueError: if the kind is cake and the model is no causal decoder.
    """
    heads: dict[str, int] = {}
    tokens = min(inputs.length or 1, 64)

    def note(call: AttentionCall) -> None:
        heads[call.layer] = operator_of(call).heads
        if kind == "cake":
            _check_causal(call)

    small = _shortened(inputs.batch, tokens if inputs.length else None)
    run_model(model, small, note)
    begin = time.perf_counter()
    run_model(model, small, lambda _: None)
    return Layers(heads, time.perf_counter() - begin, tokens)


def _check_causal(call: AttentionCall) -> None:
    """Check before any long work that the model is a causal decoder.

    Raises:
        ValueError: if it is not.
    """
    attention = operator_of(replace(call, is_self=True))
    place = torch.arange(1, attention.queries + 1, device=attention.query.device)
    if attention.queries != attention.keys or bool((attention.n_visible() > place).any()):
        raise ValueError(
            f"--kind cake: {call.layer} attends in both directions or to another sequence, as "
            "encoders do; a KV cache exists in causal decoders only: use rollout, patterns or "
            "heatmap"
        )


def _shortened(batch: Any, tokens: int | None) -> Any:
    """Return the first sample, cut to its last ``tokens`` tokens."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value[:1] if tokens is None or value.ndim < 2 else value[:1, -tokens:]

    if isinstance(batch, dict):
        return {name: cut(value) for name, value in batch.items()}
    return tuple(cut(value) for value in batch) if isinstance(batch, tuple | list) else cut(batch)


def estimated_seconds(layers: Layers, inputs: Inputs, kind: str, options: AnalyzeOptions) -> float:
    """Estimate the time of an analysis in seconds, right to a factor of about 3."""
    forward = layers.seconds * inputs.samples * max(1.0, inputs.length / max(1, layers.tokens))
    rows = sum(layers.heads.values()) * inputs.samples * inputs.length**2 * 1e-8
    mixing = len(layers.heads) * inputs.samples * inputs.length**3 * 2e-10
    if kind == "rollout":
        return 2 * forward + 2 * rows + mixing
    if kind == "patterns":
        return 2 * forward + 6 * rows + 20 * forward
    if kind == "cake":
        return 6 * forward + (options.max_new_tokens or 0) * layers.seconds
    return forward + rows


def layer_pattern(text: str | None, layers: Layers) -> str | None:
    """Turn ``--layers``, numbers or a regular expression, into a regular expression.

    Args:
        text: the option's value.
        layers: of the model.

    Returns:
        The expression; None for all layers.

    Raises:
        ValueError: if there is no such layer.
    """
    if text is None:
        return None
    names = list(layers.heads)
    listed = f"the model has {len(names)}: {', '.join(names[:4])}{' …' if len(names) > 4 else ''}"
    if re.fullmatch(r"[\d,\s-]+", text):
        numbers = parsed_numbers(text, "--layers")
        bad = [number for number in numbers if not -len(names) <= number < len(names)]
        if bad:
            raise ValueError(f"--layers {text}: no layer {bad[0]}, {listed}")
        chosen = [names[number] for number in numbers]
        return "^(?:" + "|".join(re.escape(name) for name in chosen) + ")$"
    try:
        found = any(re.search(text, name) for name in names)
    except re.error as error:
        raise ValueError(
            f"--layers {text!r}: neither numbers nor a regular expression ({error})"
        ) from None
    if not found:
        raise ValueError(f"--layers {text!r}: matches no layer, {listed}")
    return text


def chosen_heads(text: str | None, layers: Layers, pattern: str | None) -> list[int] | None:
    """Read ``--heads`` and check it against the chosen layers.

    Args:
        text: the option's value.
        layers: of the model.
        pattern: regular expression of the chosen layers; None for all.

    Returns:
        The heads, counted from 0; None for all.

    Raises:
        ValueError: if a layer has no such head.
    """
    if text is None:
        return None
    heads = parsed_numbers(text, "--heads")
    for name, count in layers.heads.items():
        if pattern is not None and not re.search(pattern, name):
            continue
        bad = [head for head in heads if not -count <= head < count]
        if bad:
            raise ValueError(
                f"--heads {text}: no head {bad[0]}, {name} has {count} (0 to {count - 1})"
            )
        heads = list(dict.fromkeys(head % count for head in heads))
    return heads
