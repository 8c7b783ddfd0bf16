"""Incidents and interventions in the terminal, above any progress bar."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TextIO

from rich.console import Console
from rich.text import Text

from stabmon.incidents import Incident, intervention_text, is_armed
from stabmon.records import Reading, counted
from stabmon.sinks.base import Sink, sink

_COLOURS = {
    "info": "green",
    "warning": "yellow",
    "error": "bold red",
    "critical": "bold white on red",
}


@sink
class ConsoleSink(Sink):
    """Print incidents on standard error, two lines for a healthy run.

    A line at the start, one for each incident that opens, changes in substance or closes, its
    advice once, one for each intervention, and one at the end. Warnings are counted at the end and
    not printed. Lines are coloured by severity on a terminal (``NO_COLOR`` is respected), plain
    elsewhere. tqdm and rich progress bars stay whole: lines are printed above them.

    Args:
        verbose: also print every change of every incident, warnings included, and one line for
            every sampled step.
        file: the stream to print to; None for ``sys.stderr`` of the moment.

    Example:
        >>> sink = ConsoleSink(file=sys.stdout)
        >>> sink.open(None, {"model": {"class": "GPT2"}, "sampling": {"every": 10}})
        >>> sink.amend({"layers": {"h.0": 4, "h.1": 4}})
        stabmon watches 2 layers, 8 heads of GPT2 every 10 steps; records are kept in memory only
        >>> sink.write_reading(Reading(10, 2.5, {}), {})
        >>> sink.close()
        stabmon done at step 10: 1 sample, no issue
    """

    in_background = False
    """Lines keep their place among those of the training loop."""

    def __init__(self, *, verbose: bool = False, file: TextIO | None = None) -> None:
        self._verbose = verbose
        self._file = file
        self._forget()

    def _forget(self) -> None:
        self._meta: dict[str, Any] = {}
        self._run_dir: Path | None = None
        self._is_open = self._started = False
        self._samples = self._step = self._interventions = 0
        self._incidents: dict[int, Incident] = {}

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self._forget()
        self._meta, self._run_dir, self._is_open = dict(meta), run_dir, True

    def amend(self, meta: Mapping[str, Any]) -> None:
        self._meta |= meta
        if "layers" in meta:
            self._start()

    def write_reading(self, reading: Reading, scalars: Mapping[str, float]) -> None:
        self._samples, self._step = self._samples + 1, reading.step
        if self._verbose:
            loss = "unknown" if reading.loss is None else f"{reading.loss:.4g}"
            shown = {
                "largest score": "attention/max_logit/max",
                "least entropy": "attention/normalized_entropy/min",
                "risk": "stability/risk",
                "open issues": "stability/issues_open",
            }
            parts = [
                f"{words} {scalars[key]:.4g}" for words, key in shown.items() if key in scalars
            ]
            self._print(_line(reading.step, ("  ".join([f"loss {loss}", *parts]), "dim")))

    def write_incidents(self, incidents: Sequence[Incident]) -> None:
        for incident in incidents:
            self._incidents[incident.number] = incident
            self._step = incident.step
            if not (incident.announced or self._verbose):
                continue
            self._start()
            name = "closed" if incident.state == "closed" else incident.severity
            self._print(
                _line(incident.step, (f"{name}: ", _COLOURS[incident.severity]), incident.text())
            )
            if incident.advises and incident.advice:
                code = f"  {incident.code}" if incident.code and "\n" not in incident.code else ""
                self._print(Text.assemble(("  what to do: ", "bold"), incident.advice, code))

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        if is_armed(record) and not self._verbose:
            return  # as in every run under guard
        step = int(record.get("step", 0))
        self._start()
        self._interventions += record.get("action") == "applied"
        self._step = max(self._step, step)
        self._print(_line(step, ("intervention: ", "bold magenta"), intervention_text(record)))

    def close(self) -> None:
        if self._is_open and (self._samples or self._incidents):
            step = self._meta.get("steps", self._step)
            self._print(Text(f"stabmon done at step {step}: {self._outcome()}"))
        self._is_open = False

    def _start(self) -> None:
        """Print the line of the start, once, before any other."""
        if self._is_open and not self._started:
            self._started = True
            self._print(Text(f"stabmon watches {self._watched()}; {self._records()}"))

    def _watched(self) -> str:
        """Return layers, heads, model and schedule in words."""
        layers = self._meta.get("layers", {})
        heads = sum(layers.values())
        model = self._meta.get("model", {}).get("class", "the model")
        every = self._meta.get("sampling", {}).get("every", 1)
        often = "every step" if every == 1 else f"every {every} steps"
        adapts = every > 1 and self._meta["sampling"].get("schedule") == "adaptive"
        often += " and more while something moves" if adapts else ""
        of = f"{counted(len(layers), 'layer')}, {counted(heads, 'head')} of " if layers else ""
        return f"{of}{model} {often}"

    def _records(self) -> str:
        """Return the place of the records in words."""
        return (
            f"records go to {self._run_dir}" if self._run_dir else "records are kept in memory only"
        )

    def _outcome(self) -> str:
        """Return the samples, the incidents and the place of the records in words."""
        alarmed = [each for each in self._incidents.values() if each.alarmed]
        warnings = len(self._incidents) - len(alarmed)
        parts = [counted(self._samples, "sample")]
        if alarmed:
            first = min(alarmed, key=lambda each: each.number)
            still = sum(each.state != "closed" for each in alarmed)
            parts.append(
                f"{counted(len(alarmed), 'alarm')}, {still} still open; "
                f"the first at step {first.first_step}: {first.headline}"
            )
        else:
            parts.append("no alarm" if warnings else "no issue")
        if warnings:
            parts.append(f"{counted(warnings, 'warning')} not printed")
        if self._interventions:
            parts.append(counted(self._interventions, "intervention"))
        where = f"; see stabmon report {self._run_dir.parent}" if self._run_dir else ""
        return ", ".join(parts) + where

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


def _line(step: int, *parts: str | tuple[str, str]) -> Text:
    """Return a line of one step."""
    return Text.assemble((f"stabmon step {step}  ", "dim"), *parts)
