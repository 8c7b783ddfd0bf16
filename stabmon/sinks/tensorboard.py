"""Scalars, incidents, interventions and every head in TensorBoard."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from stabmon.incidents import Incident, is_change
from stabmon.records import Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink
from stabmon.sinks.dashboards.head_pictures import HeadPictures, Picture
from stabmon.sinks.dashboards.panels import LAYERS, MARKER, telling
from stabmon.sinks.dashboards.run_texts import RunStory, intervention_line, step_text
from stabmon.sinks.head_images import head_matrix, signal_names

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

_STATE_CHARTS = {
    "risk that attention damages the run": "stability/risk",
    "open issues": "stability/issues_open",
    "interventions": MARKER,
    "share of the scheduled learning rate": "stability/learning_rate_factor",
}


@sink
class TensorboardSink(Sink):
    """Write scalars at their optimizer step, and issues as text.

    The text ``stability/issues`` has the step's incidents in words and each issue, the worst first;
    ``stability/history`` is the whole run so far, since TensorBoard shows a sample of the texts;
    ``stability/interventions`` the audit records, with the scalar ``stability/intervention`` at 1
    at their steps. The tab "Custom Scalars" has one category a signal: its extremes over all heads,
    and all layers in one chart. Events go to ``<run_dir>/stabmon/tensorboard``. A run resumed from
    an earlier step hides the events that it had written beyond that step.

    Args:
        writer: a ``SummaryWriter`` to write to instead; it stays open.
        per_head: write the values of all heads, one histogram per signal and sampled step
            (``attention_heads/<signal>``) and one image per signal
            (``attention_heatmap/<signal>``), instead of one image of entropy and largest score.
        image_every: sampled steps from one image to the next; there is one more at each alarm.

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
        self._log_dir: Path | None = None
        self._begin()

    def _begin(self) -> None:
        """Forget an earlier run."""
        self._pictures = HeadPictures(each_signal=self._per_head, every=self._image_every)
        self._story = RunStory()
        self._step = -1
        self._texts: dict[str, list[Any]] = {"issues": [], "incidents": [], "interventions": []}
        self._charts: tuple[str, ...] = ()
        self._intervened_at: int | None = None

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self.close()
        self._begin()
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
        shown = dict(scalars)
        if self._intervened_at is not None:
            shown[MARKER] = float(self._intervened_at == reading.step)
        self._write_layout(writer, shown)
        for name, value in shown.items():
            writer.add_scalar(name, value, reading.step)
        if self._per_head:
            for signal in signal_names(reading):
                matrix = head_matrix(reading, signal)
                finite = matrix[abs(matrix) < float("inf")]
                if finite.size:
                    writer.add_histogram(f"attention_heads/{signal}", finite, reading.step)
        self._write_pictures(writer, self._pictures.add(reading))

    def write_issue(self, issue: StabilityIssue) -> None:
        self.write_issues([issue])

    def write_issues(self, issues: Sequence[StabilityIssue]) -> None:
        self._story.add_issues(issues)
        for step in sorted({issue.step for issue in issues}):
            found = [issue for issue in issues if issue.step == step]
            self._write_text(step, "issues", found)
            self._flush(any(issue.is_alarm for issue in found))

    def write_incidents(self, incidents: Sequence[Incident]) -> None:
        if not incidents:
            return
        step = incidents[0].step
        self._story.add_incidents(incidents)
        self._write_text(step, "incidents", incidents)
        if any(each.is_alarm and (each.state == "opened" or each.alerts) for each in incidents):
            self._pictures.mark("alarm", step)
            if self._writer is not None:
                self._write_pictures(self._writer, self._pictures.draw())
        self._write_story()
        self._flush(any(each.is_alarm for each in incidents))

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        step = int(record["step"])
        self._story.add_intervention(record)
        self._write_text(step, "interventions", [record])
        if is_change(record) and self._writer is not None:
            self._intervened_at = step
            self._pictures.mark("intervention", step)
            self._writer.add_scalar(MARKER, 1.0, self._step)
        self._write_story()
        self._flush(True)

    def close(self) -> None:
        if self._writer is None:
            return
        # SummaryWriter.all_writers: None once closed, as by a Trainer's reporter before us; what is
        # added then opens a further file. Checked with torch 2.13; without it that stays open.
        reopened = getattr(self._writer, "all_writers", True) is None
        self._write_pictures(self._writer, self._pictures.draw())
        self._write_story(last_call=True)
        self._writer.flush()
        if self._own or reopened:
            self._writer.close()
        if self._own:
            self._writer = None

    def _write_text(self, step: int, kind: str, more: Iterable[Any]) -> None:
        """Write the one text of a step, with what it has had already.

        TensorBoard shows the last text of a step.
        """
        writer = self._at(step)
        if writer is None:
            return
        self._texts[kind] += more
        if kind == "interventions":
            text = "\n\n".join(map(intervention_line, self._texts[kind]))
            writer.add_text("stability/interventions", text, self._step)
        else:
            text = step_text(self._texts["issues"], self._texts["incidents"])
            writer.add_text("stability/issues", text, self._step)

    def _write_story(self, *, last_call: bool = False) -> None:
        """Write the run so far, where it is due."""
        if self._writer is not None and (text := self._story.due(last_call=last_call)):
            self._writer.add_text("stability/history", text, self._step)

    def _write_pictures(self, writer: SummaryWriter, pictures: Iterable[Picture]) -> None:
        for each in pictures:
            name = f"attention_heatmap/{each.name}"
            writer.add_image(name, each.image, self._step, dataformats="HWC")

    def _write_layout(self, writer: SummaryWriter, scalars: Mapping[str, float]) -> None:
        """Lay out the tab "Custom Scalars", once the names are known and where they change."""
        wide = tuple(name for name in scalars if not name.startswith(LAYERS))
        if wide != self._charts:
            self._charts = wide
            writer.add_custom_scalars(_layout(wide))

    def _flush(self, urgent: bool) -> None:
        if urgent and self._writer is not None:
            self._writer.flush()

    def _at(self, step: int) -> SummaryWriter | None:
        """Return the writer and go to a step, never back.

        TensorBoard drops what came after a step that is written late. At the first record of a run
        make a writer of our own: its step is where TensorBoard purges events that a resumed run
        writes anew.
        """
        if self._writer is None and self._log_dir is not None:
            from torch.utils.tensorboard import SummaryWriter

            self._writer = SummaryWriter(str(self._log_dir), purge_step=step)
        if step > self._step:
            self._step = step
            for found in self._texts.values():
                found.clear()
        return self._writer


def _layout(names: Iterable[str]) -> dict[str, dict[str, list[Any]]]:
    """Return the charts of the tab "Custom Scalars": category, title, kind and tags.

    Args:
        names: the scalars that are not of one layer.
    """
    known = set(names)
    layout: dict[str, dict[str, list[Any]]] = {}
    state = {title: name for title, name in _STATE_CHARTS.items() if name in known}
    if state:
        layout["stability"] = {title: ["Multiline", [f"{name}$"]] for title, name in state.items()}
    signals = list(dict.fromkeys(n.split("/")[1] for n in names if n.startswith("attention/")))
    for signal in dict.fromkeys([*telling(signals), *signals]):
        tags = [f"attention/{signal}/{how}" for how in ("mean", "min", "max")]
        charts: dict[str, list[Any]] = {}
        if known.issuperset(tags):
            charts["all heads: mean, between min and max"] = ["Margin", tags]
        charts["every layer"] = ["Multiline", [f"{LAYERS}.*/{signal}$"]]
        layout[signal] = charts
    return layout
