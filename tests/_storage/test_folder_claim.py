"""Check that one writer has a folder, that a second writes beside it, and that kills free it."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import stabmon
from stabmon._storage.file_lock import fcntl
from stabmon._storage.folder_claim import FolderClaim
from tests.support.small_runs import lines
from tests.support.two_ranks import inputs, loss_of, whole

pytestmark = pytest.mark.skipif(fcntl is None, reason="a system without locks")

HOLDER = """
import sys, time
from pathlib import Path
from stabmon._storage.folder_claim import FolderClaim
claim = FolderClaim(Path(sys.argv[1]))
print(claim.folder.name, flush=True)
time.sleep(60)
"""


def holder(folder: Path) -> subprocess.Popen[str]:
    """Another process that has claimed the folder."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDER, str(folder)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline().strip() == folder.name
    return process


def test_another_process_keeps_the_folder_until_it_is_killed(tmp_path: Path, caplog) -> None:
    folder = tmp_path / "stabmon"
    process = holder(folder)
    try:
        beside = FolderClaim(folder)
        assert beside.folder == tmp_path / "stabmon-2"
        (said,) = caplog.messages
        assert f"{folder} belongs to another monitor" in said
        assert str(beside.folder) in said
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    assert FolderClaim(folder).folder == folder
    beside.release()
    beside.release()


def test_a_claim_that_is_dropped_frees_its_folder(tmp_path: Path) -> None:
    claim = FolderClaim(tmp_path / "run")
    del claim
    assert FolderClaim(tmp_path / "run").folder.name == "run"


def watched(folder: Path) -> stabmon.AttentionStabilityMonitor:
    model = whole(1).train()
    optimizer = torch.optim.SGD(model.parameters(), 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, run_dir=folder, sinks=["jsonl"], log_every=1
    )
    monitor.train_step = lambda x, target: _step(monitor, model, optimizer, x, target)
    return monitor


def _step(monitor, model, optimizer, x, target) -> None:
    loss = loss_of(model(x), target)
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    monitor.on_step(loss)


def test_two_monitors_in_one_folder_keep_all_lines_of_each(tmp_path: Path) -> None:
    first, second = watched(tmp_path), watched(tmp_path)
    for x, target in inputs(5, rows=2):
        first.train_step(x, target)
        second.train_step(x, target)
    assert first.run_dir == tmp_path / "stabmon"
    assert second.run_dir == tmp_path / "stabmon-2"
    first.close()
    second.close()
    for folder in ("stabmon", "stabmon-2"):
        stored = lines(tmp_path / folder / "readings.jsonl")
        assert [(each["step"], each["run"]) for each in stored] == [(n, 1) for n in range(1, 6)]
        assert stabmon.read_records(tmp_path / folder).readings[-1].step == 5
    third = watched(tmp_path)  # both are free again
    third.train_step(*inputs(1, rows=2)[0])
    assert third.run_dir == tmp_path / "stabmon"
    third.close()
