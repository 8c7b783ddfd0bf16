"""Compare stabmon's numbers on unmodified models with float64 references.

python tests/bench/exactness.py                      the table, under a minute
python tests/bench/exactness.py --json               the same as one JSON object
python tests/bench/exactness.py --only llama         the models whose name contains a word
python tests/bench/exactness.py --check-references   the references against the models, in float64

Exit status 1 if an aim is missed.

Each model is run on one batch with plain forward hooks that hand each attention module's input to a
float64 reference (``references/``: its own formulas, the module's weights, nothing of stabmon),
then the same again inside ``AttentionCapture``, inside ``AttentionAnalyzer`` and, those in training
mode, with gradients and under ``AttentionStabilityMonitor``. Per head and layer, the mean entropy,
mean max probability and max score that analyzer and monitor report must lie within 1e-4 of the
reference (entropy in nats; score relative to max(1, |score|), before any softcap). Means are over
the rows that see at least one key: a padding token's row counts where it sees keys, as it does in
the model's own kernel.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import math
import os
import sys
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import numpy as np
import torch
from torch import Tensor, nn

from tests.bench.albert import AlbertUnavailable
from tests.bench.references import decoders, encoders, handwritten, seq2seq
from tests.bench.references.case import Batch, Case, record_calls
from tests.bench.references.formulas import statistics
from tests.bench.references.selfcheck import reference_error

CASES = (*decoders.CASES, *encoders.CASES, *seq2seq.CASES, *handwritten.CASES)
AUTOCAST_CASE = next(case for case in CASES if case.name == "Llama, grouped heads")
AIM = 1e-4
AUTOCAST_AIMS = {"attention_entropy": 0.02, "max_logit": 2.0**-7, "max_probability": 0.01}
"""Aims under bf16 autocast.

The model rounds weights, inputs, queries and keys to 8 bits there (2^-9 of each at worst); the
float64 reference does not. This row shows how far apart that puts them, and that nothing worse
happens.
"""
REFERENCE_AIM = 1e-9
SIGNALS = {"attention_entropy": "entropy", "max_logit": "max score", "max_probability": "max prob"}


@dataclass
class Row:
    """One model in one implementation."""

    model: str
    implementation: str
    expected_calls: int
    aims: dict[str, float]
    captured_calls: int | None = None
    heads: int = 0
    deviations: dict[str, float] = field(default_factory=dict)
    """Largest deviation over layers and heads, analyzer's and monitor's."""
    worst: dict[str, str] = field(default_factory=dict)
    """Layer and head of each largest deviation."""
    entropy_span: tuple[float, float] | None = None
    """Smallest and largest mean entropy of a head, by the reference, nats."""
    entropy_limit: float = 0.0
    """Mean of ln n over the rows, n the keys of a row.

    A uniform head's mean entropy in the layer where it is largest.
    """
    problems: list[str] = field(default_factory=list)
    skipped: str | None = None

    @property
    def passed(self) -> bool:
        """Return whether all calls were seen and every deviation is within its aim."""
        return not self.problems


def measure(case: Case, implementation: str, *, autocast: bool = False) -> Row:
    """Run one model with the references, the capture and the analyzer, and compare."""
    import stabmon
    from stabmon.capture import AttentionCapture

    aims = AUTOCAST_AIMS if autocast else dict.fromkeys(SIGNALS, AIM)
    row = Row(
        case.name, implementation + (", bf16 autocast" if autocast else ""), case.expected, aims
    )
    torch.manual_seed(0)
    try:
        model, batch = case.build(implementation)
    except AlbertUnavailable as error:
        row.skipped = str(error)
        return row
    model.train(case.training)

    with record_calls(model, case.attention) as calls:
        plain_output = run(model, batch, autocast)
    reference = {}
    with torch.no_grad():
        for call in calls:
            attention = case.attend(call, batch)
            reference[call.name] = statistics(attention)
            keys = attention.visible.sum(-1)
            row.entropy_limit = max(row.entropy_limit, keys[keys > 0].log().mean().item())
    entropies = torch.cat([values["attention_entropy"] for values in reference.values()])
    row.heads, row.entropy_span = len(entropies), (entropies.min().item(), entropies.max().item())

    seen: list[str] = []
    with AttentionCapture(model, lambda attention_call: seen.append(attention_call.layer)):
        run(model, batch, autocast)
    row.captured_calls = len(seen)
    if sorted(seen) != sorted(reference):
        row.problems.append(
            f"captured calls of {', '.join(sorted(set(seen)))}; expected "
            f"{', '.join(sorted(reference))}"
        )
    if len(calls) != case.expected:
        row.problems.append(
            f"the reference saw {len(calls)} calls, the architecture has {case.expected}"
        )

    with stabmon.AttentionAnalyzer(model) as analyzer:
        watched_output = run(model, batch, autocast)
    if not torch.equal(plain_output, watched_output):
        row.problems.append("the model's output is not the same bit for bit while it is watched")
    try:
        compare(row, "analyzer", analyzer.diagnose().stats, reference)
    except RuntimeError as error:
        row.problems.append(f"the analyzer has no result: {error}")

    if case.training:
        with stabmon.AttentionStabilityMonitor(model, log_every=1, sinks=[]) as monitor:
            run(model, batch, autocast, gradients=True)
            diagnosis = monitor.on_step(loss=0.0)
        if diagnosis is None:
            row.problems.append("the monitor has no result for a step it was to sample")
        else:
            compare(row, "monitor", diagnosis.stats, reference)
    return row


def run(model: nn.Module, batch: Batch, autocast: bool, *, gradients: bool = False) -> Tensor:
    """Run one forward from a fixed random state; return the model's main output."""
    torch.manual_seed(1)
    with torch.set_grad_enabled(gradients), torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        output = model(**batch)
    tensor: Tensor = output if isinstance(output, Tensor) else output[0]
    return tensor


Stats = Mapping[str, Mapping[str, Any]]


def compare(
    row: Row, source: str, stats: Stats, reference: Mapping[str, Mapping[str, Tensor]]
) -> None:
    """Enter the deviations and faults of ``stats`` into the row."""
    for title, layers in (
        ("not reported", set(reference) - set(stats)),
        ("reported, but do not attend", set(stats) - set(reference)),
    ):
        if layers:
            row.problems.append(
                f"{source}: {len(layers)} layers {title}: {', '.join(sorted(layers))}"
            )
    for signal, title in SIGNALS.items():
        worst, place = 0.0, ""
        for layer in reference.keys() & stats.keys():
            truth = reference[layer][signal].numpy()
            got = np.asarray(stats[layer].get(signal, math.nan), dtype=np.float64)
            if got.shape != truth.shape:
                row.problems.append(
                    f"{source}: {layer} {signal} has shape {got.shape}, expected {truth.shape}"
                )
                worst, place = math.inf, layer
                continue
            size = np.maximum(1.0, np.abs(truth)) if signal == "max_logit" else 1.0
            error = np.nan_to_num(np.abs(got - truth) / size, nan=math.inf)
            if error.max() >= worst:
                worst, place = float(error.max()), f"{layer} head {error.argmax()}"
        if worst >= row.deviations.get(signal, 0.0):
            row.deviations[signal], row.worst[signal] = worst, f"{source}: {place}"
        if worst > row.aims[signal]:
            row.problems.append(
                f"{source}: {title} is off by {worst:.2g} at {place}, aim {row.aims[signal]:.2g}"
            )


def rows(only: str) -> Iterator[Row]:
    """Measure every model in every implementation, and one under autocast."""
    for case in CASES:
        if only.lower() in case.name.lower():
            for implementation in case.implementations:
                yield measure(case, implementation)
            if case is AUTOCAST_CASE:
                yield measure(case, "sdpa", autocast=True)


LINE = "{:<32} {:<20} {:>8} {:>6} {:>9} {:>9} {:>9}  {:<19} {}"
HEADER = LINE.format(
    "model",
    "implementation",
    "calls",
    "heads",
    "entropy",
    "score",
    "max prob",
    "entropy span, limit",
    "",
)


def line(row: Row) -> str:
    """Format the row."""
    if row.skipped:
        return LINE.format(
            row.model, row.implementation, "-", "-", "-", "-", "-", "-", f"SKIPPED: {row.skipped}"
        )
    low, high = row.entropy_span or (math.nan, math.nan)
    deviations = [f"{row.deviations.get(signal, math.nan):.1e}" for signal in SIGNALS]
    text = LINE.format(
        row.model,
        row.implementation,
        f"{row.captured_calls}/{row.expected_calls}",
        row.heads,
        *deviations,
        f"{low:.2f}-{high:.2f}, {row.entropy_limit:.2f}",
        "ok" if row.passed else "MISSED",
    )
    return "\n".join([text, *(f"    {problem}" for problem in row.problems)])


def compare_all(arguments: argparse.Namespace) -> int:
    """Measure and print; return whether all aims were met."""
    began, measured = time.perf_counter(), []
    if not arguments.json:
        print(
            "Largest deviation from the float64 reference; aims: calls all seen, deviations "
            "within 1e-4\n" + HEADER
        )
    for row in rows(arguments.only):
        measured.append(row)
        if not arguments.json:
            print(line(row), flush=True)
    missed = [row for row in measured if not row.passed]
    seconds = time.perf_counter() - began
    if arguments.json:
        results = [asdict(row) | {"passed": row.passed} for row in measured]
        print(
            json.dumps(
                {
                    "schema_version": 1,
                    "passed": not missed,
                    "seconds": seconds,
                    "rows": finite(results),
                },
                allow_nan=False,
            )
        )
    else:
        skipped = sum(row.skipped is not None for row in measured)
        print(
            f"{len(measured) - len(missed) - skipped} met, {len(missed)} missed, {skipped} "
            f"skipped, {seconds:.0f} s"
        )
    return 1 if missed else 0


def finite(value: Any) -> Any:
    """Return the value with NaN and infinities as strings, for JSON."""
    if isinstance(value, dict):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def check_references(arguments: argparse.Namespace) -> int:
    """Hold each reference against the model's own eager attention."""
    errors: dict[str, float | str] = {}
    for case in CASES:
        if arguments.only.lower() in case.name.lower():
            try:
                errors[case.name] = reference_error(case)
            except AlbertUnavailable as why:
                errors[case.name] = f"SKIPPED: {why}"
    passed = all(isinstance(error, str) or error <= REFERENCE_AIM for error in errors.values())
    if arguments.json:
        print(
            json.dumps(
                {"schema_version": 1, "passed": passed, "probability_error": finite(errors)},
                allow_nan=False,
            )
        )
    else:
        print(
            "Largest deviation of a probability from the model's own attention, all in float64; "
            f"aim {REFERENCE_AIM:.0e}"
        )
        for name, error in errors.items():
            print(f"{name:<32} {error if isinstance(error, str) else f'{error:.1e}'}")
    return 0 if passed else 1


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output")
    parser.add_argument(
        "--only", default="", metavar="WORD", help="models whose name contains WORD"
    )
    parser.add_argument(
        "--check-references", action="store_true", help="check the references instead"
    )
    arguments = parser.parse_args()
    if not any(arguments.only.lower() in case.name.lower() for case in CASES):
        parser.error(
            f"no model's name contains {arguments.only!r}; known: "
            f"{'; '.join(case.name for case in CASES)}"
        )
    torch.set_num_threads(1)  # tensors this small only lose time to more
    return check_references(arguments) if arguments.check_references else compare_all(arguments)


if __name__ == "__main__":
    sys.exit(main())
