"""Load a model, analyse it, and describe the analysis in its record."""

from __future__ import annotations

import sys
import time

from stabmon.analysis.record import AnalysisRecord
from stabmon.check.config import ATTENTION
from stabmon.check.loading.source import LoadedModel, load_target
from stabmon.cli.analyzing.inputs import make_inputs
from stabmon.cli.analyzing.kinds import prepared
from stabmon.cli.analyzing.options import KINDS, AnalyzeOptions, flag
from stabmon.cli.analyzing.probe import estimated_seconds, probe
from stabmon.cli.errors import one_line_errors
from stabmon.cli.progress import duration, working

LONG = 10.0
"""Seconds from which the expected time is announced."""
NOT_REPEATED = frozenset(
    ("model", "text", "ids", "kind", "out", "stored", "format", "fail_on", "as_json", "seed")
)
"""Options left out of a record's command, most of which it holds otherwise."""


def analysed(options: AnalyzeOptions) -> AnalysisRecord:
    """Load the model, analyse it, and add to the record what readers need to know.

    Args:
        options: of the command.

    Returns:
        The record.

    Raises:
        ValueError: for options or input that are wrong, in one line.
    """
    if options.attn is not None and options.attn not in ATTENTION:
        raise ValueError(f"--attn {options.attn!r}: use {', '.join(ATTENTION)}")
    kind = options.kind or KINDS[0]
    begin = time.perf_counter()
    with working(f"loading {options.model}"):
        target = _whole_model(options, None if options.attn is None else ATTENTION[options.attn])
    inputs = make_inputs(target, options)
    failed = f"{options.model}: the model failed on {inputs.described}"
    mend = "give input that it takes, or fewer samples"
    with one_line_errors(failed, mend, keep=(ValueError, ImportError)):
        layers = probe(target.model, inputs, kind)
        analysis = prepared(target.model, inputs, options, layers)
        seconds = estimated_seconds(layers, inputs, kind, options)
        if seconds >= LONG:
            print(
                f"stabmon: {kind} of {inputs.described} takes about {duration(seconds)}",
                file=sys.stderr,
            )
        with working(f"{kind} of {inputs.described}"):
            record = analysis()
    notes = [*target.notes, *inputs.notes, *record.values.get("notes", ())]
    if target.analytic:
        notes.insert(
            0,
            "the weights are random, as the config initialises them: what is shown is the "
            "architecture, not a trained model",
        )
    values = {
        **record.values,
        "model": target.subject,
        "input": inputs.described,
        "samples": inputs.samples,
        "tokens": inputs.tokens,
        "notes": notes,
        "command": _command(options),
        "seconds": round(time.perf_counter() - begin, 2),
    }
    arrays = dict(record.arrays)
    if inputs.images is not None:
        arrays["images"] = inputs.images
    return AnalysisRecord(kind, values, arrays)


def _whole_model(options: AnalyzeOptions, attention: str | None) -> LoadedModel:
    """Load the whole model; of large ones ``stabmon check`` makes one layer of each kind.

    Raises:
        ValueError: if the model is too large.
    """
    target = load_target(str(options.model), attention, options.seed)
    if target.whole is not None or any("weights are too large" in note for note in target.notes):
        raise ValueError(
            f"{options.model}: the whole model ({target.parameters:,} parameters) is needed, and "
            "is too large to be made here; use a smaller one, or stabmon.analysis in your own "
            "script"
        )
    return target


def _command(options: AnalyzeOptions) -> str:
    """Return the given options, for the record."""
    words = [f"--kind {options.kind or KINDS[0]}"]
    for name, value in vars(options).items():
        if name not in NOT_REPEATED and options.given(name):
            words.append(f"{flag(name)} {value}")
    return " ".join(words)
