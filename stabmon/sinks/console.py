"""Issues in the terminal, one line each, without tearing a progress bar apart."""

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

_COLOURS = {
    "info": "cyan",
    "warning": "yellow",
    "error": "bold red",
    "critical": "bold white on red",
}


@sink
class ConsoleSink(Sink):
    """Print a line for every issue that opens, worsens or closes and for every intervention, on
    standard error.

    Coloured by severity on a terminal (``NO_COLOR`` is respected), plain elsewhere. tqdm and rich
    progress bars stay
    whole: lines are printed above them.

    Args:
        verbose: also print a one-line summary of every sampled step.
        lines_per_step: issues of one step beyond this many are counted, not printed: an ill model
            can have hundreds of ill heads.
        file: where to print; None for whatever ``sys.stderr`` is at the time.
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
        eta = "" if issue.eta_steps is None else f", harm in about {issue.eta_steps:.0f} steps"
        colour = _COLOURS.get(issue.severity, "") if issue.state != "closed" else "green"
        name = issue.severity if issue.state != "closed" else "closed"
        doing = "" if issue.state == "opened" else f" {issue.state}"
        self._print(
            Text.assemble(
                _head(issue.step),
                (f"{name:<8}", colour),
                (f" {issue.issue_type}", "bold"),
                f"{doing}  {issue.where}  value {issue.value:.4g} (limit "
                f"{issue.threshold:.4g}{eta})",
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
        """Start on a step: first say what of the last one was not printed."""
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
    """Takes tqdm's bars off the terminal for the time of a write; does nothing where nobody has
    imported tqdm.
    """
    tqdm = sys.modules.get("tqdm.std")
    if tqdm is None:
        return contextlib.nullcontext()
    mode: contextlib.AbstractContextManager[None] = tqdm.tqdm.external_write_mode(file=file)
    return mode


def _head(step: int) -> tuple[str, str]:
    """How every line begins."""
    return (f"stabmon step {step}  ", "dim")
