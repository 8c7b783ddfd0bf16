"""Fit the risk that attention damages a run, on runs with known outcomes.

python tests/bench/fit_risk.py                   train the runs of both testbeds and fit: hours
python tests/bench/fit_risk.py --only byte_gpt   the runs of one testbed
python tests/bench/fit_risk.py --out FOLDER      the folder where runs are kept, and not trained twice
python tests/bench/fit_risk.py --write           also store the model in the package

A run's score is the largest of its layers' and readings' scores. Pieces and weights are fitted to
the scores of whole runs: of a run that attention made fail up to the onset, and, at two fifths of
the weight, up to three fifths of the way there; of others to their end. Weights are not below 0, so
that more of a feature is never less risk. Every figure that is printed or stored besides the
weights comes from runs of recipes that were left out: the recipes are cut into eight parts, and
each part is scored by a fit on the others.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch.nn.functional import softplus

import stabmon.risk
from stabmon.config import StabilityConfig
from stabmon.risk.features import FEATURES, layer_features
from stabmon.risk.model import MARGINS, Piece, RiskModel
from stabmon.rules.tracking.history import History
from tests.bench.byte_gpt.cases import watched_runs as byte_gpt_runs
from tests.bench.testbed.cases import watched_runs as own_runs
from tests.bench.testbed.recipes import recipes as own_recipes
from tests.bench.watched_run import WatchedRun

Label = Literal["attention", "other", "healthy"]
FOLDS = 8
RIDGE = 0.003
STEPS = 150
SOFTNESS = 0.5
"""Temperature of the maximum over readings while fitting."""
EARLY = 0.6
"""Share of the way to the onset by which an alarm is early."""
FIRST_STEPS = 10
"""Steps within which a run that was wrong from the start may alarm."""
FIRST_READ, THEN_EVERY = (1, 2, 3, 4, 6, 8, 12, 16), 5
"""Steps that are read at first, and the interval afterwards."""
RATES = (0.01, 0.02, 0.05, 0.1, 0.2)
"""Shares of healthy runs for which thresholds are stored."""


@dataclass(frozen=True, eq=False)
class LabelledRun:
    """Features of one run and its outcome."""

    name: str
    recipe: str
    """Name of the recipe's family; runs of one are never on both sides of a cut."""
    label: Label
    onset: int | None
    steps: np.ndarray
    """``[T]`` optimizer steps of the readings."""
    features: np.ndarray
    """``[T, L, F]`` in the order of ``FEATURES``."""
    has_fault: bool = False
    """Something was wrong with the run's recipe, whatever became of it."""


def labelled(run: WatchedRun) -> LabelledRun:
    """Return the features of a watched run at the steps that are read, with its label.

    Raises:
        ValueError: if it is unclear whether the run failed.
    """
    if run.label == "unclear":
        raise ValueError(f"it is unclear whether {run.title} failed: leave it out")
    history, steps, features = History(StabilityConfig().history), [], []
    for reading in run.readings():
        is_read = reading.step in FIRST_READ or reading.step % THEN_EVERY == 0
        if not is_read or not reading.layers:
            continue
        history.add(reading)
        found = layer_features(history)
        steps.append(reading.step)
        features.append(np.stack([found[name] for name in FEATURES], -1))
    return LabelledRun(
        run.title,
        f"{run.testbed}/{run.family}",
        run.label,
        run.onset if run.label == "attention" else None,
        np.array(steps),
        np.array(features),
        run.has_fault,
    )


def fit(runs: Sequence[LabelledRun]) -> RiskModel:
    """Fit pieces and weights; the model is not calibrated yet."""
    pieces = _pieces(runs)
    size = (len(runs), max(len(r.steps) for r in runs), max(r.features.shape[1] for r in runs))
    values, hidden = np.zeros((*size, len(pieces)), np.float32), np.full(size, -1e4, np.float32)
    before, early = np.full(size[:2], -1e4, np.float32), np.full(size[:2], -1e4, np.float32)
    for at, run in enumerate(runs):
        length, layers = run.features.shape[:2]
        for column, piece in enumerate(pieces):
            values[at, :length, :layers, column] = replace(piece, weight=1.0).of(
                run.features[..., column]
            )
        hidden[at, :length, :layers] = 0
        onset = max(run.onset or 10**9, FIRST_STEPS) if run.label == "attention" else 10**9
        before[at, :length][run.steps <= onset] = 0
        early[at, :length][run.steps <= max(FIRST_STEPS, EARLY * onset)] = 0
    inputs, mask, first, second = map(torch.tensor, (values, hidden, before, early))
    failed = torch.tensor([run.label == "attention" for run in runs])
    share = torch.tensor([0.5 if run.label == "other" else 1.0 for run in runs])
    weights = torch.full((len(pieces),), 0.3, requires_grad=True)
    bias = torch.tensor(-2.0, requires_grad=True)
    optimizer = torch.optim.Adam([weights, bias], lr=0.08)
    for _ in range(STEPS):
        optimizer.zero_grad()
        score = (inputs @ weights.relu() + bias + mask).amax(2)
        whole, soon = (
            SOFTNESS * torch.logsumexp((score + each) / SOFTNESS, 1) for each in (first, second)
        )
        loss = torch.where(
            failed, 0.6 * softplus(-whole) + 0.4 * softplus(-soon), share * softplus(whole)
        )
        (loss.mean() + RIDGE * weights.square().sum()).backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    fitted = [
        replace(piece, weight=round(float(weight), 3))
        for piece, weight in zip(pieces, weights.relu().tolist(), strict=True)
    ]
    return RiskModel(tuple(fitted), round(float(bias.detach()), 3), 1.0, 0.0, {})


def _pieces(runs: Sequence[LabelledRun]) -> list[Piece]:
    """Return pieces from the healthy median to the upper end of healthy and failing runs."""
    count = len(FEATURES)
    healthy = np.concatenate(
        [run.features.reshape(-1, count) for run in runs if run.label == "healthy"]
    )
    failing = np.concatenate(
        [
            run.features[run.steps <= max(run.onset or 0, FIRST_STEPS)].reshape(-1, count)
            for run in runs
            if run.label == "attention"
        ]
    )
    low = np.nanquantile(healthy, 0.5, axis=0)
    high = np.nanquantile(np.concatenate([healthy, failing]), 0.98, axis=0)
    return [
        Piece(name, round(float(a), 4), round(float(max(b, a + 1e-6)), 4), 1.0)
        for name, a, b in zip(FEATURES, low, high, strict=True)
    ]


def scores(model: RiskModel, run: LabelledRun) -> np.ndarray:
    """Return ``[T]`` log-odds of the run's worst layer."""
    total = sum(piece.of(run.features[..., at]) for at, piece in enumerate(model.pieces))
    worst: np.ndarray = np.nanmax(model.slope * (model.bias + total) + model.offset, axis=1)
    return worst


def left_out(runs: Sequence[LabelledRun]) -> dict[str, np.ndarray]:
    """Return the scores of every run by a fit without its recipe, by name."""
    return {
        run.name: scores(model, run)
        for others, part in _cuts(runs)
        for model in [fit(others)]
        for run in part
    }


def left_out_models(runs: Sequence[LabelledRun]) -> dict[str, RiskModel]:
    """Return a model for every run that was fitted and calibrated without its recipe, by name.

    A part's thresholds come from the scores of the other parts' runs, each by a fit without its own
    part.
    """
    cuts = list(_cuts(runs))
    models = [fit(others) for others, _ in cuts]
    held = {
        run.name: scores(model, run)
        for model, (_, part) in zip(models, cuts, strict=True)
        for run in part
    }
    return {
        run.name: calibrated
        for model, (others, part) in zip(models, cuts, strict=True)
        for calibrated in [calibrate(model, others, held)]
        for run in part
    }


def _cuts(
    runs: Sequence[LabelledRun],
) -> Iterator[tuple[list[LabelledRun], list[LabelledRun]]]:
    """Yield each part's runs after those of all the other parts."""
    families = sorted({run.recipe for run in runs})
    order = np.random.RandomState(0).permutation(len(families))
    fold = {families[at]: number % FOLDS for number, at in enumerate(order)}
    for part in range(FOLDS):
        own = [run for run in runs if fold[run.recipe] == part]
        if own:
            yield [run for run in runs if fold[run.recipe] != part], own


def calibrate(
    model: RiskModel, runs: Sequence[LabelledRun], held: dict[str, np.ndarray]
) -> RiskModel:
    """Return the model with its slope and thresholds from scores of runs that were left out.

    Thresholds are quantiles of the healthy runs in whose recipe nothing is wrong.
    """
    largest = np.array([float(np.nanmax(held[run.name])) for run in runs])
    failed = np.array([run.label == "attention" for run in runs])
    x, y = torch.tensor(largest), torch.tensor(failed, dtype=torch.float64)
    ab = torch.tensor([1.0, 0.0], dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS([ab], max_iter=200)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = torch.nn.functional.binary_cross_entropy_with_logits(ab[0] * x + ab[1], y)
        loss.backward()  # type: ignore[no-untyped-call]
        return loss

    optimizer.step(closure)  # type: ignore[no-untyped-call]
    slope, offset = (round(float(each), 4) for each in ab.detach())
    plain = [
        value
        for value, run in zip(largest, runs, strict=True)
        if run.label == "healthy" and not run.has_fault
    ]
    # the next healthy run lies above the k-th of n with a chance of 1 - k / (n + 1)
    levels = np.quantile(plain, [1 - rate for rate in RATES], method="weibull")
    thresholds = {
        rate: round(float(1 / (1 + np.exp(-(slope * level + offset)))), 4)
        for rate, level in zip(RATES, levels, strict=True)
    }
    return replace(model, slope=slope, offset=offset, thresholds=thresholds)


def report(model: RiskModel, runs: Sequence[LabelledRun], held: dict[str, np.ndarray]) -> None:
    """Print alarms of runs that were left out, at each stored rate."""
    for rate, level in model.thresholds.items():
        needed = (np.log(level / (1 - level)) - model.offset) / model.slope
        first = {
            run.name: next(
                (int(s) for s, v in zip(run.steps, held[run.name], strict=True) if v >= needed),
                None,
            )
            for run in runs
        }
        attention = [run for run in runs if run.label == "attention"]
        soon = sum(
            first[run.name] is not None and first[run.name] <= max(run.onset or 0, FIRST_STEPS)  # type: ignore[operator]
            for run in attention
        )
        ever = sum(first[run.name] is not None for run in attention)
        said = [
            f"{what} {sum(first[r.name] is not None for r in of)}/{len(of)}"
            for what, of in (
                ("healthy", [r for r in runs if r.label == "healthy" and not r.has_fault]),
                (
                    "with a fault, and healthy",
                    [r for r in runs if r.label == "healthy" and r.has_fault],
                ),
                ("failed otherwise", [r for r in runs if r.label == "other"]),
            )
        ]
        print(
            f"rate {rate:.2f} risk {level:.2f}: attention failures {ever}/{len(attention)}, before "
            f"the onset {soon}/{len(attention)}; alarmed: {', '.join(said)}"
        )
    for piece in sorted(model.pieces, key=lambda each: -each.weight):
        print(f"  {piece.feature:16s} {piece.weight:5.2f}  {piece.low:8.3f} to {piece.high:.3f}")


def store(model: RiskModel, path: Path | None = None) -> Path:
    """Write the model into the package as readable JSON."""
    path = path or Path(stabmon.risk.__file__).parent / "model.json"
    data = model.to_dict() | {
        "features": FEATURES,
        "clipped_to": list(MARGINS),
        "fitted_by": "tests/bench/fit_risk.py",
    }
    path.write_text(json.dumps(data, indent=1) + "\n", encoding="utf-8")
    return path


def _source(runs: Sequence[LabelledRun]) -> str:
    """Return the runs of a fit in words."""
    parts = []
    for testbed in dict.fromkeys(run.name.partition("/")[0] for run in runs):
        labels = Counter(run.label for run in runs if run.name.startswith(f"{testbed}/"))
        parts.append(
            f"{labels.total()} runs of tests/bench/{'testbed' if testbed == 'own' else testbed} "
            f"({labels['attention']} failed by attention, {labels['other']} otherwise)"
        )
    first = ", ".join(map(str, FIRST_READ))
    return f"{' and '.join(parts)}, read at steps {first} and every {THEN_EVERY}th"


def main() -> int:
    """Fit, print the report, and store the model where that is asked for."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=["byte_gpt", "testbed"], help="runs of one testbed")
    parser.add_argument("--each", type=int, default=2, help="runs of each kind of the testbed")
    parser.add_argument("--jobs", type=int, default=2, help="runs trained at a time")
    parser.add_argument(
        "--out", type=Path, default=Path("runs/testbed"), help="where runs are kept"
    )
    parser.add_argument("--write", action="store_true", help="store the model in the package")
    args = parser.parse_args()
    found: list[WatchedRun] = []
    if args.only != "testbed":
        found += byte_gpt_runs(args.out / "byte_gpt", args.jobs)
    if args.only != "byte_gpt":
        found += own_runs(own_recipes(args.each), args.out, args.jobs)
    runs = [labelled(run) for run in found if run.label != "unclear"]
    runs = [run for run in runs if len(run.steps)]
    held = left_out(runs)
    model = replace(calibrate(fit(runs), runs, held), source=_source(runs))
    report(model, runs, held)
    if args.write:
        print(f"stored in {store(model)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
