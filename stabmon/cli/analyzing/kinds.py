"""Run one kind of analysis and return its record."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.forward import run_model
from stabmon.analysis.record import AnalysisRecord
from stabmon.analysis.rollout.result import Rollout
from stabmon.cli.analyzing.inputs import Inputs
from stabmon.cli.analyzing.options import Options, parsed_numbers, parsed_size
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall

WHOLE_MATRIX = 2048
"""Tokens up to which a rollout without targets is made of all rows."""
NEW_TOKENS = 16
"""Tokens that a compressed cache generates where the user says nothing."""
MAP_SIDE = 256
"""Side of the maps that patterns are drawn with; heatmaps have up to 512."""


@dataclass(frozen=True)
class Layers:
    """Hold the layers that a small forward has shown."""

    heads: dict[str, int]
    """Layer -> query heads, in the order of the forward."""
    seconds: float
    """Of a forward on ``tokens`` tokens of one sample."""
    tokens: int


def look(model: nn.Module, inputs: Inputs, kind: str) -> Layers:
    """Run the model twice on a little of the first sample: list its layers, and time it.

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
    """Refuse, before any long work, what simulating a cache would refuse."""
    attention = operator_of(replace(call, is_self=True))
    place = torch.arange(1, attention.queries + 1, device=attention.query.device)
    if attention.queries != attention.keys or bool((attention.n_visible() > place).any()):
        raise ValueError(
            f"--kind cake: {call.layer} attends in both directions or to another sequence, as "
            "encoders "
            "do; a KV cache exists in causal decoders only: use rollout, patterns or heatmap"
        )


def _shortened(batch: Any, tokens: int | None) -> Any:
    """The first sample, its first tokens where ``tokens`` says so."""

    def cut(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.ndim:
            return value
        return value[:1] if tokens is None or value.ndim < 2 else value[:1, -tokens:]

    if isinstance(batch, dict):
        return {name: cut(value) for name, value in batch.items()}
    return tuple(cut(value) for value in batch) if isinstance(batch, tuple | list) else cut(batch)


def estimated_seconds(layers: Layers, inputs: Inputs, kind: str, options: Options) -> float:
    """Estimate how long an analysis takes, from the small forward; right to a factor of about 3."""
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
    """Turn ``--layers`` into a regular expression: numbers and ranges, or one already.

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
    """Read ``--heads`` and hold it against the chosen layers.

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


def prepared(
    model: nn.Module, inputs: Inputs, options: Options, layers: Layers
) -> Callable[[], AnalysisRecord]:
    """Check all that can be checked without long work, and return what runs the analysis.

    Raises:
        ValueError: in one line, for what the kind, the model or the input cannot.
    """
    kinds: dict[str, Callable[..., Callable[[], AnalysisRecord]]] = {
        "rollout": _rollout,
        "patterns": _patterns,
        "cake": _cake,
        "heatmap": _heatmap,
    }
    return kinds[options.kind or "rollout"](model, inputs, options, layers)


def _targets(options: Options, inputs: Inputs) -> list[int] | None:
    if options.target is None:
        return None
    targets = parsed_numbers(options.target, "--target")
    bad = [each for each in targets if inputs.length and not -inputs.length <= each < inputs.length]
    if bad:
        raise ValueError(
            f"--target {options.target}: no token {bad[0]}, samples have {inputs.length} (0 to "
            f"{inputs.length - 1})"
        )
    return targets


def _rollout(
    model: nn.Module, inputs: Inputs, options: Options, layers: Layers
) -> Callable[[], AnalysisRecord]:
    from stabmon.analysis.attribution.summary import compute_attention_attribution
    from stabmon.analysis.rollout.api import attention_rollout

    pattern = layer_pattern(options.layers, layers)
    targets = _targets(options, inputs)
    notes = []
    if targets is None and inputs.length > WHOLE_MATRIX:
        targets = [-1]
        notes.append(
            f"more than {WHOLE_MATRIX} tokens: the last one alone was attributed; name others "
            "with --target"
        )

    def run() -> AnalysisRecord:
        rollout = attention_rollout(
            model,
            inputs.batch,
            targets=targets,
            head_fusion=options.head_fusion or "mean",  # type: ignore[arg-type]
            weighting=options.weighting,
            stack=options.stack,
            attention_layer_pattern=pattern,
        )
        numbers = compute_attention_attribution(
            model, inputs.batch, attention_layer_pattern=pattern, stack=options.stack
        )
        checked, told = _deletions(model, inputs, rollout)
        record = rollout.to_record(attribution=numbers, faithfulness=checked)
        return AnalysisRecord(record.kind, {**record.values, "notes": notes + told}, record.arrays)

    return run


def _deletions(
    model: nn.Module, inputs: Inputs, rollout: Rollout
) -> tuple[dict[str, Any] | None, list[str]]:
    """Delete what the rollout ranks first; None, and why, where this model's tokens cannot be taken
    away.
    """
    from stabmon.analysis.attribution.faithfulness import deletion_check

    if rollout.stack == "joined":
        return None, []
    try:
        return deletion_check(model, inputs.batch, rollout).to_values(), []
    except ValueError as reason:
        return None, [f"no deletion check: {reason}"]


def _patterns(
    model: nn.Module, inputs: Inputs, options: Options, layers: Layers
) -> Callable[[], AnalysisRecord]:
    from stabmon.analysis.patterns.api import attention_patterns

    targets = _targets(options, inputs)
    if targets is not None and len(targets) > 1:
        raise ValueError(
            f"--target {options.target}: patterns are told of one query; give one number"
        )
    pattern = layer_pattern(options.layers, layers)
    heads = chosen_heads(options.heads, layers, pattern)

    def run() -> AnalysisRecord:
        found = attention_patterns(
            model,
            inputs.batch,
            query=-1 if targets is None else targets[0],
            attention_layer_pattern=pattern,
            map_size=MAP_SIDE,
        )
        record = found.to_record()
        return AnalysisRecord(record.kind, {**record.values, "heads": heads}, record.arrays)

    return run


def _cake(
    model: nn.Module, inputs: Inputs, options: Options, layers: Layers
) -> Callable[[], AnalysisRecord]:
    from stabmon.analysis.kv_cache.budgets import tokens_of
    from stabmon.analysis.kv_cache.checks import check_count, check_sizes
    from stabmon.analysis.kv_cache.policies.cake import Cake
    from stabmon.analysis.kv_cache.simulate import simulate_cake

    if not inputs.length:
        raise ValueError(
            f"--kind cake: {type(model).__name__} generates no text and has no KV cache; use "
            "rollout, patterns or heatmap"
        )
    notes: list[str] = []
    window = 32 if options.window is None else options.window
    if options.cache_size is None:
        size: int | float = max(inputs.length // 4, 2 * window)
        notes.append(
            f"cache size of {size} keys chosen: a quarter of the prompt, at least two windows; "
            "--cache-size sets it"
        )
    else:
        size = parsed_size(options.cache_size)
    room = inputs.positions - inputs.length if inputs.positions is not None else NEW_TOKENS
    if (
        options.max_new_tokens is not None
        and options.max_new_tokens > room
        and inputs.positions is not None
    ):
        raise ValueError(
            f"--max-new-tokens {options.max_new_tokens}: the model has {inputs.positions} "
            f"positions and the prompt {inputs.length} "
            f"tokens; give at most {room}, or a smaller --length"
        )
    settings: dict[str, Any] = {
        name: getattr(options, name)
        for name in ("tau1", "tau2", "gamma", "pool", "allotment")
        if getattr(options, name) is not None
    }
    Cake(**settings)
    check_count("window_size", window, least=2)
    lengths = inputs.lengths
    shortest = min(lengths)
    if shortest <= window:
        raise ValueError(
            f"--window {window}: leaves nothing to evict of a prompt of {shortest} tokens; give "
            f"less than {shortest}, or a longer text"
        )
    check_sizes(tokens_of(size, lengths), lengths, window)

    def run() -> AnalysisRecord:
        report = simulate_cake(
            model,
            inputs.batch,
            cache_size=size,
            window_size=window,
            max_new_tokens=min(NEW_TOKENS, room)
            if options.max_new_tokens is None
            else options.max_new_tokens,
            **settings,
        )
        record = report.to_record(_perplexities(model, inputs, size, window, settings, notes))
        told = [*notes, *record.values.get("notes", ())]
        return AnalysisRecord(record.kind, {**record.values, "notes": told}, record.arrays)

    return run


def _perplexities(
    model: nn.Module,
    inputs: Inputs,
    size: int | float,
    window: int,
    settings: dict[str, Any],
    notes: list[str],
) -> Any:
    """Score the last quarter of each sample after the rest was compressed; None where it is
    short.
    """
    from stabmon.analysis.kv_cache.perplexity import perplexity_by_cache_size
    from stabmon.analysis.kv_cache.policies.cake import Cake
    from stabmon.analysis.kv_cache.policy import POLICIES

    ids = inputs.batch["input_ids"]
    following = min(64, inputs.length // 4)
    context = inputs.length - following
    keys = size if isinstance(size, int) else max(window + 1, round(size * context))
    sizes = sorted(
        {each for each in (max(window + 1, keys // 2), keys, 2 * keys) if window < each < context}
    )
    if not following or not sizes:
        notes.append(
            "no perplexities: the samples are too short beside the cache; give a longer --length"
        )
        return None
    names = [name for name in POLICIES if name not in ("full", "cake")]
    mask = inputs.batch.get("attention_mask")
    return perplexity_by_cache_size(
        model,
        ids[:, :context],
        ids[:, context:],
        sizes=sizes,
        policies=[Cake(**settings), *names],
        window_size=window,
        attention_mask=None if mask is None else mask[:, :context],
    )


def _heatmap(
    model: nn.Module, inputs: Inputs, options: Options, layers: Layers
) -> Callable[[], AnalysisRecord]:
    from stabmon.analysis.patterns.maps import attention_maps

    pattern = layer_pattern(options.layers, layers)
    heads = chosen_heads(options.heads, layers, pattern)

    def run() -> AnalysisRecord:
        found = attention_maps(model, inputs.batch, layers=pattern, heads=heads)
        notes = [f"the first of {inputs.samples} samples is drawn"] if inputs.samples > 1 else []
        record = found.to_record()
        return AnalysisRecord(
            record.kind, {**record.values, "heads": heads, "notes": notes}, record.arrays
        )

    return run
