"""The analysis of ``--kind cake``: a simulated KV cache and its cost."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stabmon.analysis.kv_cache.budgets import tokens_of
from stabmon.analysis.kv_cache.checks import check_count, check_sizes
from stabmon.analysis.kv_cache.perplexity import perplexity_by_cache_size
from stabmon.analysis.kv_cache.policies.cake import Cake
from stabmon.analysis.kv_cache.policy import POLICIES
from stabmon.analysis.kv_cache.simulate import simulate_cake
from stabmon.analysis.record import AnalysisRecord
from stabmon.cli.analyzing.inputs import Inputs
from stabmon.cli.analyzing.options import AnalyzeOptions
from stabmon.cli.analyzing.parsing import parsed_size

NEW_TOKENS = 16
"""Default number of tokens to generate with the compressed cache."""


def prepared_cake(
    model: nn.Module, inputs: Inputs, options: AnalyzeOptions
) -> Callable[[], AnalysisRecord]:
    """Check the options of a simulated cache and return the function that simulates it.

    Args:
        model: a causal decoder.
        inputs: its batch of tokens.
        options: of the command.

    Returns:
        A function without arguments that returns the record.

    Raises:
        ValueError: in one line, for settings that do not fit the prompt or the model.
    """
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
    new, room = options.max_new_tokens, NEW_TOKENS
    if inputs.positions is not None:
        room = inputs.positions - inputs.length
        if new is not None and new > room:
            raise ValueError(
                f"--max-new-tokens {new}: the model has {inputs.positions} positions and the "
                f"prompt {inputs.length} tokens; give at most {room}, or a smaller --length"
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
            max_new_tokens=min(NEW_TOKENS, room) if new is None else new,
            **settings,
        )
        record = report.to_record(_perplexities(model, inputs, size, window, settings, notes))
        all_notes = [*notes, *record.values.get("notes", ())]
        return AnalysisRecord(record.kind, {**record.values, "notes": all_notes}, record.arrays)

    return run


def _perplexities(
    model: nn.Module,
    inputs: Inputs,
    size: int | float,
    window: int,
    settings: dict[str, Any],
    notes: list[str],
) -> Any:
    """Score the last quarter of each sample after compressing the rest; None if too short."""
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
