"""Log of every step's training loss, for comparing runs step by step."""

from __future__ import annotations

from pathlib import Path

from stabmon._storage import strict_json


class LossLog:
    """Appends ``{"step": N, "loss": x}``, flushed line by line.

    Args:
        path: the file; its folder exists.
        resume_step: an earlier run's lines beyond this step are dropped; the resumed run writes
            them again.
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
        """Add one step; a NaN or an infinity is kept as such.

        See :mod:`stabmon._storage.strict_json`.
        """
        self._file.write(strict_json.dumps({"step": step, "loss": loss}) + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file. May be called twice."""
        self._file.close()


def read_losses(path: Path) -> dict[int, float]:
    """Read step -> loss, in the order of steps.

    An unfinished last line of a killed run is ignored.
    """
    whole = path.read_text().rpartition("\n")[0].splitlines()
    records = [strict_json.loads(line) for line in whole]
    return dict(sorted((int(record["step"]), float(record["loss"])) for record in records))
