"""A training run in its own process, followed through its files.

Losses, issues as they open, and interventions.
"""

from __future__ import annotations

import subprocess
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from stabmon._storage import strict_json
from stabmon.records import SEVERITIES, StabilityIssue


class LiveRun:
    """A running command and its new records.

    Args:
        name: beginning of lines about the run.
        folder: the run's; the command's output goes to ``output.log`` in it.
        command: the command to run.
        env: its environment.
    """

    def __init__(
        self, name: str, folder: Path, command: Sequence[str], env: Mapping[str, str]
    ) -> None:
        self.name = name
        self.folder = folder
        folder.mkdir(parents=True)
        with (folder / "output.log").open("w") as log:
            self.process = subprocess.Popen(
                command, stdout=log, stderr=subprocess.STDOUT, env=dict(env)
            )
        self._losses = follow(folder / "losses.jsonl")
        self._issues = follow(folder / "stabmon" / "issues.jsonl")
        self._interventions = follow(folder / "stabmon" / "interventions.jsonl")
        self._severity: dict[tuple[str, str | None, int | None], int] = defaultdict(lambda: -1)
        self._suggested = False

    def new_losses(self) -> list[float]:
        """Return the losses of the steps since the last call."""
        return [record["loss"] for record in self._losses()]

    def news(self) -> Iterator[str]:
        """Yield a line for each new event since the last call.

        Events are kinds of issue that opened, turned more severe or closed, and interventions.
        """
        groups: dict[tuple[int, str, str], list[StabilityIssue]] = defaultdict(list)
        for record in self._issues():
            issue = StabilityIssue.from_dict(record)
            rank = -1 if issue.state == "closed" else SEVERITIES.index(issue.severity)
            if issue.state == "closed" or rank > self._severity[issue.key]:
                groups[
                    issue.step, issue.issue_type, "closed" if rank < 0 else issue.severity
                ].append(issue)
            self._severity[issue.key] = rank
        for (step, issue_type, word), issues in groups.items():
            first = issues[0]
            line = f"{self.name:<9} step {step:<4} {word:<8} {issue_type:<17} {first.where}"
            if word != "closed":
                line += f"  value {first.value:.3g}, limit {first.threshold:.3g}"
                line += (
                    ""
                    if first.eta_steps is None
                    else f", damage in about {first.eta_steps:.0f} steps"
                )
            yield line + (f"  (and {len(issues) - 1} more)" if len(issues) > 1 else "")
            if first.is_alarm and not self._suggested:
                self._suggested = True
                yield f"{'':<9} what to do: {first.suggestion}"

        for record in self._interventions():
            if (
                record["action"] in ("applied", "undone", "released")
                and record["intervention"] != "skip_step"
            ):
                yield (
                    f"{self.name:<9} step {record['step']:<4} {record['action']:<8} "
                    f"{record['intervention']:<17} {record['why']}"
                )

    def stop(self) -> None:
        """End the process, if it is still running."""
        if self.process.poll() is None:
            self.process.terminate()
            self.process.wait()


def follow(path: Path) -> Callable[[], list[dict[str, Any]]]:
    """Make a reader of the records added to a file since its last call.

    None while there is no such file.
    """
    at = 0

    def read() -> list[dict[str, Any]]:
        nonlocal at
        if not path.exists():
            return []
        with path.open("rb") as file:
            file.seek(at)
            whole, newline, _ = file.read().rpartition(b"\n")
        at += len(whole) + len(newline)
        return [strict_json.loads(line) for line in whole.splitlines()]

    return read
