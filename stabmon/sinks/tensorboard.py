"""Scalars, issues and, on request, every head in TensorBoard."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabmon.records import SEVERITIES, Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink
from stabmon.sinks.head_images import colour_range, head_image, head_matrix, signal_names
from stabmon.sinks.issue_table import numbers_in_words

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter


@sink
class TensorboardSink(Sink):
    """Write scalars at their optimizer step, and issues as text.

    The text ``stability/issues`` has the worst issue first. Events go to
    ``<run_dir>/stabmon/tensorboard``. A run resumed from an earlier step hides the events that it
    had written beyond that step.

    Args:
        writer: a ``SummaryWriter`` to write to instead; it stays open.
        per_head: also write the values of all heads, one histogram per signal and sampled step
            (``attention_heads/<signal>``) and a layers × heads heatmap
            (``attention_heatmap/<signal>``).
        image_every: sampled steps from one heatmap to the next.

    Raises:
        ImportError: on opening, where tensorboard is not installed.
        ValueError: on opening, with neither a run folder nor a writer.
    """

    def __init__(
        self, *, writer: SummaryWriter | None = None, per_head: bool = False, image_every: int = 10
    ) -> None:
        self._writer = writer
        self._own = writer is None
        self._per_head = per_head
        self._image_every = image_every
        self._readings = 0
        self._log_dir: Path | None = None
        self._written: tuple[int, list[StabilityIssue]] = (-1, [])

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        if not self._own:
            return
        try:
            import torch.utils.tensorboard  # noqa: F401
        except ImportError as error:
            raise ImportError(
                'tensorboard is not installed: pip install "stabmon[tensorboard]"'
            ) from error
        if run_dir is None:
            raise ValueError(
                "TensorboardSink has no folder to write to: give the monitor a run_dir, or the "
                "sink a writer"
            )
        self._log_dir = run_dir / "tensorboard"

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        writer = self._at(reading.step)
        if writer is None:
            return
        for name, value in scalars.items():
            writer.add_scalar(name, value, reading.step)
        if self._per_head:
            for signal in signal_names(reading):
                self._write_heads(writer, reading, signal)
        self._readings += 1

    def write_issue(self, issue: StabilityIssue) -> None:
        self.write_issues([issue])

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        for step in sorted({issue.step for issue in issues}):
            self._write_text(step, [issue for issue in issues if issue.step == step])

    def _write_text(self, step: int, issues: Sequence[StabilityIssue]) -> None:
        """Write one text with all issues of a step, earlier ones of the step included.

        TensorBoard shows only the last text of a step.
        """
        writer = self._at(step)
        if writer is None:
            return
        self._written = (step, [*(self._written[1] if self._written[0] == step else []), *issues])
        worst_first = sorted(self._written[1], key=lambda issue: -SEVERITIES.index(issue.severity))
        writer.add_text(
            "stability/issues", "\n\n".join(_text(issue) for issue in worst_first), step
        )
        if any(issue.is_alarm for issue in issues):
            writer.flush()

    def close(self) -> None:
        if self._writer is None:
            return
        self._writer.flush()
        if self._own:
            self._writer.close()
            self._writer = None

    def _at(self, step: int) -> SummaryWriter | None:
        """Return the writer; at the first record of a run make one of our own.

        The record's step is where TensorBoard purges events that a resumed run writes anew.
        """
        if self._writer is None and self._log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._log_dir), purge_step=step)
        return self._writer

    def _write_heads(self, writer: SummaryWriter, reading: Reading, signal: str) -> None:
        """Write the histogram and, when it is due, the heatmap of one signal."""
        matrix = head_matrix(reading, signal)
        finite = matrix[abs(matrix) < float("inf")]
        if finite.size:
            writer.add_histogram(f"attention_heads/{signal}", finite, reading.step)
        if self._readings % self._image_every == 0 and matrix.size:
            image = head_image(matrix, *colour_range(signal, matrix))
            writer.add_image(f"attention_heatmap/{signal}", image, reading.step, dataformats="HWC")


def _text(issue: StabilityIssue) -> str:
    """Return one issue in Markdown."""
    return (
        f"**{issue.severity}**, {issue.state}: {issue.issue_type}, {issue.where}, "
        f"{numbers_in_words(issue)}. {issue.suggestion}"
    )
