"""The demo's parts on small known records, and the whole of it on a tiny model."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from live import LiveRun, follow

from stabmon._storage import strict_json
from stabmon.records import StabilityIssue

ROOT = Path(__file__).parents[2]


def issue(step: int, head: int, severity: str, state: str = "opened") -> str:
    record = StabilityIssue(
        step, "h.0", head, "logit_growth", severity, 80.0 + head, 60.0, "Clip it.", state=state
    )  # type: ignore[arg-type]
    return strict_json.dumps(record.to_dict()) + "\n"


def test_following_returns_each_whole_line_once(tmp_path: Path) -> None:
    path = tmp_path / "losses.jsonl"
    read = follow(path)
    assert read() == []
    path.write_text('{"step": 1}\n{"st')
    assert read() == [{"step": 1}]
    assert read() == []
    with path.open("a") as file:
        file.write('ep": 2}\n')
    assert read() == [{"step": 2}]


def test_an_issue_is_reported_when_it_opens_grows_more_severe_or_closes_and_not_again(
    tmp_path: Path,
) -> None:
    run = LiveRun("bad", tmp_path / "run", [sys.executable, "-c", ""], os.environ)
    issues = tmp_path / "run" / "stabmon" / "issues.jsonl"
    issues.parent.mkdir()

    def new_lines(*lines: str) -> list[str]:
        with issues.open("a") as file:
            file.writelines(lines)
        return list(run.news())

    first = (
        "bad       step 5    warning  logit_growth      h.0 head 0  value 80, limit 60  (and "
        "1 more)"
    )
    assert new_lines(issue(5, 0, "warning"), issue(5, 1, "warning")) == [first]
    assert new_lines(issue(6, 0, "warning", "worsened")) == []
    alarm, mend = new_lines(issue(7, 1, "error", "worsened"))
    assert alarm == "bad       step 7    error    logit_growth      h.0 head 1  value 81, limit 60"
    assert mend.strip() == "what to do: Clip it."
    assert new_lines(issue(8, 1, "info", "closed")) == [
        "bad       step 8    closed   logit_growth      h.0 head 1"
    ]
    assert len(new_lines(issue(9, 1, "error"))) == 1
    run.stop()


@pytest.mark.long
def test_the_whole_demo_on_a_tiny_model(tmp_path: Path, text: Path) -> None:
    words = (
        "model.layers=1 model.width=32 corpus.block=64 training.steps=60 training.batch=2 "
        "scale_qk.start=20 scale_qk.factor=1.3"
    )
    command = [
        sys.executable,
        str(ROOT / "train" / "demo.py"),
        "--only",
        "lightning",
        "--out",
        "out",
        *words.split(),
    ]
    done = subprocess.run(
        [*command, f"corpus.text={text}"], cwd=tmp_path, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for expected in (
        "provoked  step ",
        "fault          from step 20 on, W_q and W_k of all layers times 1.3 a step",
        "first alarm    step ",
        "0 in the provoked one before the fault",
        "records      out/lightning/provoked/stabmon",
        "under guard    ",
        "  guarded ",
        "TensorBoard ",
        "offline, nothing was sent",
    ):
        assert expected in done.stdout
    for name in ("healthy", "provoked", "guarded"):
        run = tmp_path / "out" / "lightning" / name
        assert list(run.glob("wandb/offline-run-*/*.wandb")), "no offline W&B run"
        assert list(run.glob("tensorboard/**/events.out.tfevents.*")), "no TensorBoard events"
    again = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (again.returncode, again.stderr) == (
        2,
        "error: out exists: name a new folder with --out\n",
    )
