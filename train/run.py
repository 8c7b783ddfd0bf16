"""Common frame of the training scripts.

Read settings, prepare the run's folder, report the outcome.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import platform
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch
from losses import LossLog, read_losses
from settings import RunSettings, SettingsError, read_settings
from torch import Tensor

from stabmon._storage import strict_json
from stabmon.config import load_config
from stabmon.tiny.corpus import Corpus, CorpusError, load_corpus
from stabmon.tiny.language_models import ShapeError

R = TypeVar("R", bound=RunSettings)
LAST = 20
"""Steps of the average for the final training loss."""


@dataclass(frozen=True, eq=False)
class Run:
    """A new or resumed run."""

    folder: Path
    corpus: Corpus
    stream: Tensor
    """Indices of each step's blocks, ``[steps, batch]``."""
    checkpoint: Path | None
    """Checkpoint to resume from; None for a run from scratch."""
    done: int
    """Optimizer steps before the checkpoint."""
    losses: LossLog


@dataclass(frozen=True)
class Outcome:
    """Final losses of a run."""

    step: int
    train_loss: float
    """Mean over the last steps."""
    validation_loss: float


def start(settings: RunSettings, checkpoints: str) -> Run:
    """Load the corpus and open the run's folder, new or to resume.

    Args:
        settings: the run's.
        checkpoints: pattern of the script's checkpoints in the folder, such as
            ``checkpoints/step=*.pt``: a number stands for ``*``.

    Raises:
        SettingsError: if there is a run in the folder already and ``resume`` is false, or none to
            resume.
        CorpusError: if the text cannot be used.
    """
    training, folder = settings.training, Path(settings.run_dir)
    if settings.stabmon is not None:
        try:
            load_config(**dataclasses.asdict(settings.stabmon))
        except ValueError as error:
            raise SettingsError(f"stabmon: {error}") from error
    corpus = load_corpus(**dataclasses.asdict(settings.corpus))
    numbered = {int(re.findall(r"\d+", path.name)[-1]): path for path in folder.glob(checkpoints)}
    if settings.resume and not numbered:
        raise SettingsError(
            f"resume is true, but {folder} holds no checkpoint {checkpoints}: start with "
            "resume=false"
        )
    if not settings.resume and (folder / "losses.jsonl").exists():
        raise SettingsError(
            f"run_dir {folder} holds a run already: go on with resume=true, or name another run_dir"
        )
    folder.mkdir(parents=True, exist_ok=True)
    if training.threads is not None:
        torch.set_num_threads(training.threads)
    done = max(numbered) if settings.resume else 0
    about = {
        "settings": dataclasses.asdict(settings),
        "corpus": {
            "source": corpus.source,
            "sha256": corpus.sha256,
            "train": len(corpus.train),
            "validation": len(corpus.validation),
        },
        "versions": {"python": platform.python_version(), "torch": torch.__version__},
        "threads": torch.get_num_threads(),
        "resumed_from_step": done,
    }
    (folder / "run.json.tmp").write_text(json.dumps(about, indent=2) + "\n")
    (folder / "run.json.tmp").replace(folder / "run.json")
    stream = corpus.stream(training.steps, training.batch, settings.seed)
    return Run(
        folder,
        corpus,
        stream,
        numbered.get(done),
        done,
        LossLog(folder / "losses.jsonl", resume_step=done),
    )


def finish(run: Run, validation_loss: float) -> Outcome:
    """Close the loss log and write the run's outcome, also to ``outcome.json``."""
    run.losses.close()
    losses = read_losses(run.folder / "losses.jsonl")
    last = list(losses.values())[-LAST:]
    outcome = Outcome(
        max(losses, default=0), math.fsum(last) / len(last) if last else math.nan, validation_loss
    )
    (run.folder / "outcome.json").write_text(strict_json.dumps(dataclasses.asdict(outcome)) + "\n")
    return outcome


def main(cls: type[R], train: Callable[[R], Outcome], doc: str) -> int:
    """Read the command line, train, print the final line.

    Returns:
        The exit status: 2 for a wrong call, with one line of explanation.
    """
    parser = argparse.ArgumentParser(
        description=doc, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("config", help="a YAML file, such as those in configs/")
    parser.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings to lay over the file, such as training.steps=50",
    )
    parser.add_argument(
        "--text",
        metavar="FILE",
        help="learn this file in place of the default corpus; the same as corpus.text=FILE",
    )
    args = parser.parse_intermixed_args()
    overrides = args.overrides + ([f"corpus.text={json.dumps(args.text)}"] if args.text else [])
    try:
        settings = read_settings(cls, args.config, overrides)
        outcome = train(settings)
    except (SettingsError, CorpusError, ShapeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(
        f"{Path(sys.argv[0]).stem}: step {outcome.step}, train loss {outcome.train_loss:.4f} "
        f"(mean of the last {LAST} steps), "
        f"validation loss {outcome.validation_loss:.4f}, records in {settings.run_dir}"
    )
    return 0
