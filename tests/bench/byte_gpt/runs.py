"""Runs of recipes, trained once and kept in a folder."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from stabmon.records import Reading
from tests.bench.byte_gpt.recipe import Recipe
from tests.bench.byte_gpt.train import SEED, Run, train
from tests.bench.kept_runs import pack_readings, train_missing, unpack_readings, write_whole


@dataclass(frozen=True)
class Job:
    """A recipe and how to watch it; see :func:`tests.bench.byte_gpt.train.train`."""

    recipe: Recipe
    seed: int = SEED
    config: str | None = None
    log_every: int = 1
    settings: tuple[tuple[str, Any], ...] = ()
    """Further settings of the monitor, as names and values."""

    def path_in(self, folder: Path) -> Path:
        """Return the file of the run; readings lie beside it."""
        text = json.dumps(asdict(self), sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:12]
        watched = "plain" if self.config is None else f"{self.config}-{self.log_every}"
        return folder / f"{self.recipe.name}-s{self.seed}-{watched}-{digest}.pickle"


def run_all(jobs: Sequence[Job], folder: Path, processes: int) -> list[Run]:
    """Train the runs missing in ``folder``; return all in order, without their readings."""
    paths = [job.path_in(folder) for job in jobs]
    train_missing(dict(zip(paths, jobs, strict=True)), _train_and_keep, processes)
    return [pickle.loads(path.read_bytes()) for path in paths]


def readings_of(job: Job, folder: Path) -> list[Reading]:
    """Return the readings of a kept run."""
    return unpack_readings(_readings_beside(job.path_in(folder)).read_bytes())


def _train_and_keep(job: Job, path: Path) -> None:
    run = train(job.recipe, job.seed, job.config, job.log_every, **dict(job.settings))
    # the readings first: the run's own file says that both are there
    write_whole(_readings_beside(path), pack_readings(run.readings))
    write_whole(path, pickle.dumps(replace(run, readings=[])))


def _readings_beside(path: Path) -> Path:
    return path.with_suffix(".readings.gz")
