"""Demonstrate stabmon on three runs per framework: healthy, provoked, guarded.

make demo
python train/demo.py --only lightning --out runs/demo-lightning training.steps=300

First under the Hugging Face Trainer, then under Lightning. All runs share seed, weights and
batches. In the provoked and the guarded one W_q and W_k grow wrongly from mid-training on
(``scale_qk`` in the recipe): a real state of the weights, from which scores, entropy and, later,
the loss deteriorate by themselves. The healthy and the provoked run are only watched; in the
guarded one stabmon intervenes (``guard``), while the weights are still corrupted at every step. One
thread each. Nothing leaves the machine: W&B runs offline.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shlex
import sys
import time
from collections import Counter
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from live import LiveRun
from losses import read_losses
from paired_runs import WINDOW, departure
from tqdm import tqdm  # type: ignore[import-untyped]

from stabmon._storage import strict_json
from stabmon.records import StabilityIssue
from stabmon.sinks.reader import read_records

ROOT = Path(__file__).parents[1]
FRAMEWORKS = {"hf": ("Hugging Face Trainer", "hf_gpt"), "lightning": ("Lightning", "lightning_gpt")}
RUNS = {
    "healthy": ["provoke=none"],
    "provoked": ["provoke=scale_qk"],
    "guarded": ["provoke=scale_qk", "stabmon.config=guard"],
}
OFFLINE = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "DO_NOT_TRACK": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "WANDB_ERROR_REPORTING": "false",
    "OMP_NUM_THREADS": "1",
}


def main() -> int:
    """Run and compare the runs of each framework. Returns the exit status."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--out", type=Path, help="a new folder for all runs; runs/demo-DATE-TIME by default"
    )
    parser.add_argument("--only", choices=FRAMEWORKS, help="one framework instead of both")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings for all runs, such as training.steps=300",
    )
    args = parser.parse_intermixed_args()
    out: Path = args.out or Path("runs") / f"demo-{datetime.now():%Y%m%d-%H%M%S}"
    if out.exists():
        print(f"error: {out} exists: name a new folder with --out", file=sys.stderr)
        return 2
    began = time.monotonic()
    for name in [args.only] if args.only else FRAMEWORKS:
        framework, script = FRAMEWORKS[name]
        print(
            f"\n=== {framework}: a healthy run, the same with an injected fault, and that under "
            f"guard (train/{script}.py)",
            flush=True,
        )
        try:
            run_all(out / name, script, args.overrides)
        except ChildProcessError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(f"\n--- {framework}: what came first")
        print(compare(out / name), flush=True)
    print(
        f"\n=== Where everything is ({time.monotonic() - began:.0f} s in all)\n{list_outputs(out)}"
    )
    return 0


def run_all(out: Path, script: str, overrides: Sequence[str]) -> None:
    """Train all runs at once and print findings and interventions as they happen.

    A progress bar for each run.

    Args:
        out: folder of the runs.
        script: name of the training script.
        overrides: settings for all runs.

    Raises:
        ChildProcessError: if a run fails, with the end of its output.
    """
    runs, bars = [], []
    try:
        for position, (name, settings) in enumerate(RUNS.items()):
            command = [
                sys.executable,
                str(ROOT / "train" / f"{script}.py"),
                str(ROOT / "configs" / f"train_{script}.yaml"),
            ]
            own = [f"run_dir={(out / name).absolute()}", *settings, "loggers=[tensorboard, wandb]"]
            fast = ["training.threads=1", "training.validate_every=null"]
            runs.append(
                LiveRun(name, out / name, [*command, *own, *fast, *overrides], os.environ | OFFLINE)
            )
            bars.append(
                tqdm(desc=f"{name:<9}", position=position, unit="step", leave=False, disable=None)
            )
        running = True
        while running:
            running = any(
                run.process.poll() is None for run in runs
            )  # asked first, so that the last lines are read after the end
            for run, bar in zip(runs, bars, strict=True):
                if (run.folder / "run.json").exists():
                    bar.total = read_settings_of(run.folder)["training"]["steps"]
                if losses := run.new_losses():
                    bar.update(len(losses))
                    bar.set_postfix(loss=f"{losses[-1]:.3f}")
                for line in run.news():
                    tqdm.write(line)
                if run.process.poll():
                    tail = (run.folder / "output.log").read_text().splitlines()[-15:]
                    raise ChildProcessError(
                        "\n".join(
                            [
                                f"the {run.name} run failed; the end of {run.folder}/output.log:",
                                *tail,
                            ]
                        )
                    )
            time.sleep(0.3)
    finally:
        for bar in bars:
            bar.close()
        for run in runs:
            run.stop()


def compare(out: Path) -> str:
    """Compare the runs in ``out``, in words."""
    healthy, provoked, guarded = (out / name for name in RUNS)
    settings = read_settings_of(provoked)
    scale, every = settings["scale_qk"], settings["stabmon"]["log_every"]
    departed = departure(*(read_losses(run / "losses.jsonl") for run in (healthy, provoked)))
    false = alarms(healthy)
    early = [issue for issue in alarms(provoked) if issue.step < scale["start"]]
    first = next((issue for issue in alarms(provoked) if issue.step >= scale["start"]), None)

    def against_alarm(step: int | None) -> str:
        if step is None or first is None:
            return "never" if step is None else f"step {step}"
        return (
            f"step {step}, {abs(step - first.step)} steps "
            f"{'after' if step >= first.step else 'BEFORE'} the alarm"
        )

    layers = "all layers" if scale["layers"] is None else f"layers {scale['layers']}"
    alarm = (
        "none"
        if first is None
        else f"step {first.step}, {first.severity}: {first.issue_type}, {first.where}"
    )
    lines = [
        f"fault          from step {scale['start']} on, W_q and W_k of {layers} times "
        f"{scale['factor']:g} a step",
        f"first alarm    {alarm} (one step in {every} is looked at)",
        f"first sign     {against_alarm(departed.first_sign)} [1]",
        f"loss departs   {against_alarm(departed.step)} [2]",
        f"false alarms   {len(false)} in the healthy run, {len(early)} in the provoked one before "
        "the fault",
        f"[1] from here on the gap between the pair, averaged over {WINDOW} steps, stays above "
        f"{departed.first_sign_limit:.3f} nats, "
        "3 x its own noise;\n    a run without a paired one on the same batches cannot show it",
        f"[2] from here on the same gap stays above {departed.limit:.3f} nats, 3 x the noise of "
        "such an average of the healthy loss",
        f"under guard    {summarise_interventions(guarded)}",
        f"{'final loss':<14} {'train':>7} {'validation':>11}",
    ]
    for run in (healthy, provoked, guarded):
        outcome = strict_json.loads((run / "outcome.json").read_text())
        lines.append(
            f"  {run.name:<12} {outcome['train_loss']:7.3f} {outcome['validation_loss']:11.3f}"
        )
    return "\n".join(lines)


def summarise_interventions(run: Path) -> str:
    """Summarise the interventions of a guarded run in a line."""
    records = [
        record
        for record in read_records(run).interventions
        if record["intervention"] != "skip_step"
    ]
    applied = [record for record in records if record["action"] == "applied"]
    if not applied:
        return "nothing was done"
    counts = Counter(record["intervention"] for record in applied)
    words = ", ".join(
        f"{name} {'once' if count == 1 else f'{count} times'}" for name, count in counts.items()
    )
    places = {tuple(place) for record in applied for place in record["places"]}
    kinds = {
        "heads": [p for p in places if p[1] is not None],
        "layers": [p for p in places if p[0] and p[1] is None],
    }
    where = (
        " and ".join(f"{len(found)} {kind}" for kind, found in kinds.items() if found) or "the run"
    )
    return f"{words}, first at step {applied[0]['step']}, on {where} in all (interventions.jsonl)"


def list_outputs(out: Path) -> str:
    """List the written records, with the commands to open them."""
    bin_ = Path(sys.executable).parent
    with contextlib.suppress(ValueError):
        bin_ = bin_.relative_to(Path.cwd())
    offline = sorted(out.glob("*/*/wandb/offline-run-*"))
    records = sorted(out.glob("*/*/stabmon"))
    a_run = records[-1].parent if records else out
    return "\n".join(
        [
            *(f"records      {folder}" for folder in records),
            f"             {bin_ / 'stabmon'} watch {shlex.quote(str(a_run))} --once      where "
            "it ended, in the terminal",
            f"TensorBoard  {bin_ / 'tensorboard'} --logdir {shlex.quote(str(out))}      then open "
            "the address that it prints",
            *(f"W&B          {folder}" for folder in offline),
            f"             offline, nothing was sent; with an account: {bin_ / 'wandb'} sync "
            "FOLDER",
        ]
    )


def alarms(run: Path) -> list[StabilityIssue]:
    """Return the alarms of a run, in the order of steps."""
    return [
        issue for issue in read_records(run).issues if issue.is_alarm and issue.state != "closed"
    ]


def read_settings_of(run: Path) -> dict[str, Any]:
    """Read the settings of a run."""
    settings: dict[str, Any] = json.loads((run / "run.json").read_text())["settings"]
    return settings


if __name__ == "__main__":
    sys.exit(main())
