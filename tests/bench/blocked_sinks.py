"""Measure step times with a sink that blocks, and with a disk that is full for a while.

    python tests/bench/blocked_sinks.py [--seconds 60] [--steps 400] [--every 10]

Each case trains the same small model in a process of its own, and prints the median, the 99th
percentile and the longest step, and how long closing took. ``plain`` has no monitor. ``blocked``
has a sink whose first call blocks; ``full`` writes its records to a small tmpfs that another file
fills for a while, where one can be mounted, else to a folder whose files may not grow meanwhile.
The log's own lines on it are printed; lines lost are counted in the records.
"""

from __future__ import annotations

import argparse
import logging
import os
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import stabmon
from stabmon.records import Reading
from stabmon.sinks import Sink

CASES = ("plain", "watched", "blocked", "full")


class BlockedSink(Sink):
    """A server that answers its first call late."""

    def __init__(self, seconds: float) -> None:
        self.seconds, self.first = seconds, True

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        if self.first:
            self.first = False
            time.sleep(self.seconds)


@contextmanager
def small_disk(folder: Path) -> Iterator[str]:
    """Mount a tmpfs of 4 MB on a folder; yield what is used to fill it."""
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)], capture_output=True
    )
    try:
        yield "tmpfs of 4 MB" if made.returncode == 0 else "limit on the size of files"
    finally:
        if made.returncode == 0:
            subprocess.run(["umount", "-l", str(folder)], capture_output=True)


def fill(folder: Path, how: str) -> None:
    """Leave no space in a folder."""
    if how.startswith("tmpfs"):
        with suppress(OSError), (folder / "filler").open("wb", buffering=0) as file:
            while True:
                file.write(b"x" * 512)
    else:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


def free(folder: Path, how: str) -> None:
    """Give the space back."""
    if how.startswith("tmpfs"):
        (folder / "filler").unlink(missing_ok=True)
    else:
        limit = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))


def train(case: str, steps: int, every: int, seconds: float, folder: Path, how: str) -> np.ndarray:
    """Train, and return the seconds of each step."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(64, 4, 128, batch_first=True, dropout=0.0)
    model = nn.TransformerEncoder(layer, 2)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    sinks: list[Any] = ["jsonl"] + ([BlockedSink(seconds)] if case == "blocked" else [])
    monitor = None
    if case != "plain":
        monitor = stabmon.AttentionStabilityMonitor(
            model,
            optimizer,
            log_every=every,
            schedule="fixed",
            sinks=sinks,
            run_dir=folder / "run",
            report=False,
        )
    took = []
    x = torch.randn(4, 32, 64)
    for step in range(steps):
        if case == "full" and step == steps // 4:
            fill(folder, how)
        if case == "full" and step == 3 * steps // 4:
            free(folder, how)
        begun = time.perf_counter()
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if monitor is not None:
            monitor.on_step(loss)
        took.append(time.perf_counter() - begun)
    begun = time.perf_counter()
    if monitor is not None:
        monitor.close()
    closing = time.perf_counter() - begun
    said = np.array(took[5:]) * 1e3  # the first steps warm up
    print(
        f"{case:8} steps {steps}, sampled every {every}: median {np.median(said):.1f} ms, "
        f"p99 {np.percentile(said, 99):.1f} ms, longest {said.max():.1f} ms; "
        f"training {np.sum(took):.1f} s, closing {closing:.2f} s"
    )
    digest = sum(float(each.detach().double().sum()) for each in model.parameters())
    print(f"         weights sum to {digest!r}")
    return said


def run(case: str, given: argparse.Namespace) -> None:
    """Run one case, and print what its records and its log say."""
    lines: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(record.getMessage())

    log = logging.getLogger("stabmon")
    log.addHandler(Kept())
    log.setLevel(logging.INFO)
    log.propagate = False
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        if case == "full":
            with small_disk(folder) as how:
                print(f"         the disk: {how}")
                train(case, given.steps, given.every, given.seconds, folder, how)
                report(folder, given)
        else:
            train(case, given.steps, given.every, given.seconds, folder, "")
            if case != "plain":
                report(folder, given)
    for line in lines:
        if "works again" in line or "Sink" in line:
            print(f"         log: {line}")
    alive = [each.name for each in threading.enumerate() if each.name.startswith("stabmon")]
    print(f"         threads left: {alive or 'none'}")
    sys.stdout.flush()
    os._exit(0) if alive else None


def report(folder: Path, given: argparse.Namespace) -> None:
    """Print how many readings are on disk, and what the records say is missing."""
    records = stabmon.read_records(folder / "run")
    written = len(records.readings)
    due = given.steps // given.every
    gaps = "; ".join(gap.text() for gap in records.gaps) or "none"
    print(f"         readings on disk {written} of {due}; gaps marked: {gaps}")


def main() -> None:
    """Run every case in a process of its own."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--case", choices=CASES)
    given = parser.parse_args()
    torch.set_num_threads(1)
    if given.case:
        run(given.case, given)
        return
    for case in CASES:
        subprocess.run([sys.executable, __file__, "--case", case, *sys.argv[1:]], check=True)


if __name__ == "__main__":
    main()
