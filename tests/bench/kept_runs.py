"""Train what is missing in a folder, several at a time, and keep it there."""

from __future__ import annotations

import gzip
import multiprocessing
import pickle
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import TypeVar

from tqdm import tqdm  # type: ignore[import-untyped]

from stabmon.records import Reading

Job = TypeVar("Job")


def train_missing(
    jobs: Mapping[Path, Job], train_and_keep: Callable[[Job, Path], None], processes: int
) -> None:
    """Train every job whose file does not exist yet.

    Args:
        jobs: the jobs by the file that each makes.
        train_and_keep: trains a job and writes its file; a function of a module.
        processes: jobs trained at a time.
    """
    missing = {path: job for path, job in jobs.items() if not path.exists()}
    if not missing:
        return
    for folder in {path.parent for path in missing}:
        folder.mkdir(parents=True, exist_ok=True)
    if processes == 1:
        for path, job in tqdm(missing.items(), desc="training", unit="run", disable=None):
            if not path.exists():  # another study may share the folder
                train_and_keep(job, path)
        return
    with ProcessPoolExecutor(processes, multiprocessing.get_context("spawn")) as pool:
        waiting = [pool.submit(train_and_keep, job, path) for path, job in missing.items()]
        for done in tqdm(
            as_completed(waiting), total=len(waiting), desc="training", unit="run", disable=None
        ):
            done.result()


def write_whole(path: Path, data: bytes) -> None:
    """Write a file that exists only once it is complete."""
    part = path.with_name(path.name + ".part")
    part.write_bytes(data)
    part.rename(path)


def pack_readings(readings: Sequence[Reading]) -> bytes:
    """Return readings as bytes that versions of stabmon with other fields can read."""
    return gzip.compress(pickle.dumps([each.to_dict() for each in readings]), 1)


def unpack_readings(data: bytes) -> list[Reading]:
    """Return the readings of :func:`pack_readings`."""
    return [Reading.from_dict(each) for each in pickle.loads(gzip.decompress(data))]
