"""First alarms of trainspotter and trainpulse, which see the loss alone.

Runs in a virtual environment of its own, that of ``--peers``: it reads losses by run as JSON from
standard input, and writes the index of the first alarm by tool and run. trainspotter judges a
finished log, so that it is asked again every tenth step, as its ``watch`` does.
"""

from __future__ import annotations

import json
import math
import sys

AGAIN = 10
"""Steps from one look at the log to the next."""


def by_trainpulse(losses: list[float]) -> int | None:
    """Return the first step with any alert of trainpulse."""
    from trainpulse import Monitor

    monitor = Monitor()
    return next((at for at, loss in enumerate(losses) if monitor.log("loss", at, loss)), None)


def by_trainspotter(losses: list[float]) -> int | None:
    """Return the first step at which a look at the log finds an error."""
    from trainspotter import Run, run_all

    for end in [*range(AGAIN, len(losses), AGAIN), len(losses)]:
        run = Run()
        for at, loss in enumerate(losses[:end]):
            run.add_point("train/loss", at, loss)
        run.finalize()
        if any(each.severity == "error" for each in run_all(run)):
            return end - 1
    return None


if __name__ == "__main__":
    runs = {
        name: [math.nan if loss is None else loss for loss in losses]
        for name, losses in json.load(sys.stdin).items()
    }
    tools = {"trainspotter": by_trainspotter, "trainpulse": by_trainpulse}
    json.dump(
        {
            tool: {name: first(losses) for name, losses in runs.items()}
            for tool, first in tools.items()
        },
        sys.stdout,
    )
