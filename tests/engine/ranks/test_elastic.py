"""A rank that dies under torchrun: both ranks go on from the checkpoint, and no record is lost."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist

from tests.bench.kill_resume import Cycle, Result, is_right, result_of, row_of, run_through
from tests.support.killed_runs import EVERY, STEPS, checkpoints

pytestmark = [
    pytest.mark.long,
    pytest.mark.skipif(not dist.is_available(), reason="torch without distributed"),
]

DIES_AFTER = 14
"""Step after which rank 1 dies; the newest checkpoint is of step 12."""


def restarted(folder: Path) -> subprocess.CompletedProcess[str]:
    """Train under torchrun, which restarts the ranks once."""
    folder.mkdir()
    elastic = ["torch.distributed.run", "--nproc_per_node=2", "--max-restarts=1"]
    endpoint = ["--rdzv-backend=c10d", "--rdzv-endpoint=localhost:0"]
    run = ["-m", "tests.support.elastic_run", str(folder), str(DIES_AFTER)]
    return subprocess.run(
        [sys.executable, "-m", *elastic, *endpoint, *run],
        capture_output=True,
        text=True,
        timeout=240,
        env=os.environ
        | {
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(Path(__file__).parents[3]),
            # gloo's default group meets at addresses of dead ranks in a store that outlives them
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1",
        },
    )


def test_ranks_that_torchrun_restarts_go_on_together_and_lose_nothing(tmp_path: Path) -> None:
    whole = tmp_path / "whole"
    whole.mkdir()
    reference: Result = run_through("two ranks", whole)
    done = restarted(tmp_path / "elastic")
    assert done.returncode == 0, done.stderr[-3000:]
    folder = tmp_path / "elastic"
    assert (folder / "died").exists(), "rank 1 died"
    assert [int(each.name.partition("-")[2]) for each in checkpoints("loop", folder)] == list(
        range(EVERY, STEPS + 1, EVERY)
    )
    result = result_of(folder)
    resumed_from = DIES_AFTER // EVERY * EVERY
    cycle = Cycle("two ranks", "whole", DIES_AFTER, resumed_from, True, result, False)
    row = row_of([cycle], reference)
    assert is_right("whole", row), row
    assert "empty history" not in result.log, "all ranks have their state"
    assert sum(reference.steps.values()) == STEPS
    assert reference.audit, "guard intervened"
