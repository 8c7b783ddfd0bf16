"""A guarded run of two ranks under torchrun, of which rank 1 dies by SIGKILL once in mid-run.

python -m torch.distributed.run --nproc_per_node=2 --max-restarts=1 -m tests.support.elastic_run FOLDER STEP
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from tests.support.killed_runs import train


def main(folder: str, dies_after: int) -> None:
    """Train to the end, from the newest checkpoint where torchrun has restarted the ranks."""
    number, is_first = int(os.environ["RANK"]), os.environ["TORCHELASTIC_RESTART_COUNT"] == "0"

    def after_step(step: int) -> None:
        if is_first and number == 1 and step == dies_after:
            (Path(folder) / "died").touch()
            os.kill(os.getpid(), signal.SIGKILL)

    train("two ranks", folder, number, "env://", after_step)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
