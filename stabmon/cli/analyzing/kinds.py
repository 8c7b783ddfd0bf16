"""Prepare one kind of analysis: check what can be checked, then run it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from stabmon.analysis.record import AnalysisRecord
from stabmon.analysis.rollout.result import Rollout
from stabmon.cli.analyzing.inputs import Inputs
from stabmon.cli.analyzing.options import KINDS, AnalyzeOptions
from stabmon.cli.analyzing.parsing import parsed_numbers
from stabmon.cli.analyzing.probe import Layers, chosen_heads, layer_pattern

WHOLE_MATRIX = 2048
"""Largest number of tokens for which a rollout without targets holds all rows."""
MAP_SIDE = 256
"""Side of the maps drawn with patterns; heatmaps have up to 512."""
Analysis = Callable[[], AnalysisRecord]


def prepared(model: nn.Module, inputs: Inputs, options: AnalyzeOptions, layers: Layers) -> Analysis:
    """Check what can be checked without long work and return the analysis.

    Args:
        model: the model.
        inputs: its batch.
        options: of the command.
        layers: of the model.

    Returns:
        A function without arguments that returns the record.

    Raises:
        ValueError: in one line, for options that do not fit the kind, the model or the input.
    """
    kind = options.kind or KINDS[0]
    if kind == "cake":
        from stabmon.cli.analyzing.cake import prepared_cake

        return prepared_cake(model, inputs, options)
    kinds = {"rollout": _rollout, "patterns": _patterns, "heatmap": _heatmap}
    return kinds[kind](model, inputs, options, layers)


def _targets(options: AnalyzeOptions, inputs: Inputs) -> list[int] | None:
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


def _rollout(model: nn.Module, inputs: Inputs, options: AnalyzeOptions, layers: Layers) -> Analysis:
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
        checked, reasons = _deletions(model, inputs, rollout)
        record = rollout.to_record(attribution=numbers, faithfulness=checked)
        return AnalysisRecord(
            record.kind, {**record.values, "notes": notes + reasons}, record.arrays
        )

    return run


def _deletions(
    model: nn.Module, inputs: Inputs, rollout: Rollout
) -> tuple[dict[str, Any] | None, list[str]]:
    """Check a rollout by deleting tokens; None and the reason if the model cannot."""
    from stabmon.analysis.attribution.faithfulness import deletion_check

    if rollout.stack == "joined":
        return None, []
    try:
        return deletion_check(model, inputs.batch, rollout).to_values(), []
    except ValueError as reason:
        return None, [f"no deletion check: {reason}"]


def _patterns(
    model: nn.Module, inputs: Inputs, options: AnalyzeOptions, layers: Layers
) -> Analysis:
    from stabmon.analysis.patterns.api import attention_patterns

    targets = _targets(options, inputs)
    if targets is not None and len(targets) > 1:
        raise ValueError(f"--target {options.target}: patterns describe one query; give one number")
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


def _heatmap(model: nn.Module, inputs: Inputs, options: AnalyzeOptions, layers: Layers) -> Analysis:
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
