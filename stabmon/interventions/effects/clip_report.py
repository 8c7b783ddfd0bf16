"""Report repeated clips of scores, at most one audit record for each sampled step."""

from __future__ import annotations

import math

from stabmon.interventions.run.training_run import TrainingRun


class ClipReport:
    """The clips since the last audit record.

    Args:
        run: the run, with the audit that takes the records.

    Example:
        >>> report = ClipReport(TrainingRun(None, audit=lambda record: print(record["after"])))
        >>> report.note("attn", 1, 0.5)
        >>> report.note("attn", 1, 0.5)
        >>> report.write()
        {'clips': {'attn head 1': 2}, 'factor': {'attn head 1': 0.25}}
    """

    def __init__(self, run: TrainingRun) -> None:
        self.run = run
        self._factors: dict[tuple[str, int], list[float]] = {}
        """Factors of the clips, by module and head."""
        self._reported_at: int | None = None
        """Step of the newest reading at the last record."""

    def start(self) -> None:
        """Begin at the newest reading: the next one is the first that is reported."""
        self._reported_at = self._newest()

    def note(self, name: str, head: int, factor: float) -> None:
        """Note a clip.

        Args:
            name: the module's name.
            head: the query head.
            factor: the factor on its scores.
        """
        self._factors.setdefault((name, head), []).append(factor)

    def end_step(self) -> None:
        """Write the record if a reading has come since the last."""
        latest = self._newest()
        if latest != self._reported_at:
            self._reported_at = latest
            self.write()

    def write(self) -> None:
        """Write all clips since the last record as one."""
        if not self._factors:
            return
        named = {f"{name} head {head}": each for (name, head), each in self._factors.items()}
        self.run.audit(
            {
                "intervention": "qk_clip",
                "action": "again",
                "step": self.run.step,
                "layer": None,
                "head": None,
                "places": [list(place) for place in self._factors],
                "before": {},
                "after": {
                    "clips": {place: len(factors) for place, factors in named.items()},
                    "factor": {place: math.prod(factors) for place, factors in named.items()},
                },
                "why": "scores rose above their target again",
            }
        )
        self._factors = {}

    def _newest(self) -> int | None:
        return self.run.history.latest.step if len(self.run.history) else None
