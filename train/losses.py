"""Every step's training loss as a line of ``losses.jsonl``, so that runs can be compared step by
step.
"""

from __future__ import annotations

from pathlib import Path

from stabmon._storage import strict_json


class LossLog:
    """Appends ``{"step": N, "loss": x}``, flushed a line at a time.

    Args:
        path: the file; its folder exists.
        resume_step: what an earlier run wrote beyond this step is dropped; the resumed run writes
            it again.
    """

    def __init__(self, path: Path, resume_step: int = 0) -> None:
        kept = (
            {step: loss for step, loss in read_losses(path).items() if step <= resume_step}
            if path.exists()
            else {}
        )
        self._file = path.open("w")
        for step, loss in kept.items():
            self.write(step, loss)

    def write(self, step: int, loss: float) -> None:
        """Add one step; a NaN or an infinity is kept as such (see
        :mod:`stabmon._storage.strict_json`).
        """
        self._file.write(strict_json.dumps({"step": step, "loss": loss}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def read_losses(path: Path) -> dict[int, float]:
    """Step -> loss, in the order of steps; a last line that a killed run left unfinished is
    ignored.
    """
    whole = path.read_text().rpartition("\n")[0].splitlines()
    records = [strict_json.loads(line) for line in whole]
    return dict(sorted((int(record["step"]), float(record["loss"])) for record in records))
