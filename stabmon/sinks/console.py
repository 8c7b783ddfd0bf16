"""Issues in the terminal, one line each, above any progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from stabmon.records import SEVERITIES, Reading, StabilityIssue
from stabmon.sinks.base import Sink, sink
from stabmon.sinks.issue_table import numbers_in_words

_COLOURS = {
    "info": "cyan",
    "warning": "yellow",
    "error": "bold red",
    "critical": "bold white on red",
}


@sink
class ConsoleSink(Sink):
    """Print changes of issues and interventions on standard error.

    Lines are coloured by severity on a terminal (``NO_COLOR`` is respected), plain elsewhere. tqdm
    and rich progress bars stay whole: lines are printed above them.

    Args:
        verbose: also print a one-line summary of every sampled step.
        lines_per_step: issues of one step beyond this many are counted, not printed: an unstable
            model can have hundreds of anomalous heads.
        file: the stream to print to; None for ``sys.stderr`` of the moment.
    """

    def __init__(
        self, *, verbose: bool = False, lines_per_step: int = 20, file: TextIO | None = None
    ) -> None:
        self._verbose = verbose
        self._lines_per_step = lines_per_step
        self._file = file
        self._step = 0
        self._printed = 0
        self._unprinted: Counter[str] = Counter()

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self._turn_to(0)

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self._turn_to(reading.step)
        if self._verbose:
            loss = "unknown" if reading.loss is None else f"{reading.loss:.4g}"
            shown = {
                "max logit": "attention/max_logit/max",
                "least entropy": "attention/normalized_entropy/min",
            }
            parts = [
                f"loss {loss}",
                *(
                    f"{words} {scalars[name]:.4g}"
                    for words, name in shown.items()
                    if name in scalars
                ),
            ]
            parts.append(f"{scalars.get('stability/issues_open', 0):.0f} issues open")
            self._print(Text.assemble(_head(reading.step), ("  ".join(parts), "dim")))

    def write_issue(self, issue: StabilityIssue) -> None:
        self._turn_to(issue.step)
        if self._printed >= self._lines_per_step:
            self._unprinted[issue.severity] += 1
            return
        self._printed += 1
        colour = _COLOURS.get(issue.severity, "") if issue.state != "closed" else "green"
        name = issue.severity if issue.state != "closed" else "closed"
        change = "" if issue.state == "opened" else f" {issue.state}"
        self._print(
            Text.assemble(
                _head(issue.step),
                (f"{name:<8}", colour),
                (f" {issue.issue_type}", "bold"),
                f"{change}  {issue.where}  {numbers_in_words(issue)}",
                ("" if issue.state == "closed" else f"  {issue.suggestion}", "dim"),
            )
        )

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        step = record.get("step", self._step)
        plain = {
            key: value
            for key, value in record.items()
            if key != "step" and isinstance(value, (str, int, float))
        }
        words = [
            str(value) if key in ("intervention", "name") else f"{key} {value}"
            for key, value in plain.items()
        ]
        self._print(
            Text.assemble(_head(step), ("intervention", "bold magenta"), "  ", "  ".join(words))
        )

    def close(self) -> None:
        self._turn_to(0)

    def _turn_to(self, step: int) -> None:
        """Begin a step, after a line on the issues of the last one that were not printed."""
        if step == self._step:
            return
        if self._unprinted:
            counts = ", ".join(
                f"{self._unprinted[name]} {name}"
                for name in reversed(SEVERITIES)
                if self._unprinted[name]
            )
            self._print(
                Text.assemble(
                    _head(self._step),
                    (f"and {self._unprinted.total()} more issues ({counts})", "yellow"),
                )
            )
        self._step, self._printed = step, 0
        self._unprinted.clear()

    def _print(self, line: Text) -> None:
        """Print one line above any progress bar.

        The line is rendered first and then written to ``sys.stderr`` as it stands: a live rich
        display puts a proxy there that prints above itself, which a console of our own would walk
        around.
        """
        file = self._file or sys.stderr
        console = Console(file=file, highlight=False, force_jupyter=False)
        with console.capture() as rendered:
            console.print(line, soft_wrap=True)
        with _above_tqdm(file):
            file.write(rendered.get())
            file.flush()


def _above_tqdm(file: TextIO) -> contextlib.AbstractContextManager[None]:
    """Take tqdm's bars off the terminal during a write, where tqdm is imported."""
    tqdm = sys.modules.get("tqdm.std")
    if tqdm is None:
        return contextlib.nullcontext()
    mode: contextlib.AbstractContextManager[None] = tqdm.tqdm.external_write_mode(file=file)
    return mode


def _head(step: int) -> tuple[str, str]:
    """Return the beginning of every line."""
    return (f"stabmon step {step}  ", "dim")
