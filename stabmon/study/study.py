"""Do controllers help? Train and compare them over seeds.

Each variant is trained on a frozen base and from scratch with it, beside controls of the same size.
For every seed the base is trained first. Then each variant's own parameters are trained on that
base, which is frozen; and each variant is trained from scratch, base and all, on the same data in
the same order as the base was. Losses are compared within a seed. Tasks run side by side in
processes of their own; each leaves a file when it is done, and a resumed study skips those.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from stabmon.config import load_config
from stabmon.study.pictures import draw_generation
from stabmon.study.plan import StudySettings, Task, tasks
from stabmon.study.settings import SettingsError
from stabmon.study.side_by_side import run_tasks
from stabmon.study.variants import VARIANTS
from stabmon.tiny.corpus import load_corpus


def run_study(
    settings: StudySettings,
    progress: Callable[[str], None] = lambda line: None,
    now: Callable[[str], None] = lambda line: None,
) -> Path:
    """Train everything without a result.

    Args:
        settings: the study.
        progress: called with a line at the start and after each task.
        now: called every few seconds with the state of the trainings.

    Returns:
        The folder of results, one JSON file per task.

    Raises:
        SettingsError: if the settings are wrong, or do not fit those in ``run_dir``.
        CorpusError: if the text cannot be used.
    """
    folder = prepare(settings)
    everything = tasks(settings)
    remaining = [
        task for task in everything if not (folder / "results" / f"{task.name}.json").exists()
    ]
    began, done = time.monotonic(), len(everything) - len(remaining)
    kept = f", {done} of {len(everything)} done before" if done else ""
    progress(f"{len(remaining)} trainings{kept}, {settings.workers or 1} at a time, into {folder}")

    def counted(line: str) -> str:
        return f"[{done}/{len(everything)}, {time.monotonic() - began:.0f} s] {line}"

    for task, result in run_tasks(settings, remaining, lambda line: now(counted(line))):
        done += 1
        progress(counted(f"{task.name}: held-out loss {result['held_out']:.4f}"))
    shown = [name for name in settings.frozen if VARIANTS[name].controller]
    if shown:
        learned = [name for name in shown if VARIANTS[name].controller == "info_density"] or shown
        seed = settings.seeds[0]
        draw_generation(
            settings.model, settings.corpus, folder, Task("frozen", learned[-1], seed).name, seed
        )
    return folder


def prepare(settings: StudySettings) -> Path:
    """Write the settings into the study's folder and return the folder."""
    if settings.stabmon is not None:
        try:
            load_config(**dataclasses.asdict(settings.stabmon))
        except ValueError as error:
            raise SettingsError(f"stabmon: {error}") from error
    corpus = load_corpus(**dataclasses.asdict(settings.corpus))
    if len(corpus.validation) < 2:
        raise SettingsError(
            f"corpus: {corpus.source} leaves {len(corpus.validation)} held-out blocks: use a "
            "longer text"
        )
    folder = Path(settings.run_dir)
    about = {
        "settings": dataclasses.asdict(settings),
        "corpus": {"source": corpus.source, "sha256": corpus.sha256},
    }
    known = folder / "study.json"
    if known.exists():
        if not settings.resume:
            raise SettingsError(
                f"run_dir {folder} holds a study already: go on with resume=true, or name another "
                "run_dir"
            )
        if result_settings(json.loads(known.read_text())) != result_settings(about):
            raise SettingsError(
                f"run_dir {folder} holds a study with other settings: name another run_dir"
            )
    (folder / "results").mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(about, indent=2) + "\n")
    return folder


def result_settings(about: dict[str, Any]) -> dict[str, Any]:
    """Return the part of a study's description with influence on single results."""
    left_out = {
        "run_dir",
        "resume",
        "workers",
        "seeds",
        "watch_every",
        "stabmon",
        "frozen",
        "joint",
    }
    return {
        **about,
        "settings": {
            name: value for name, value in about["settings"].items() if name not in left_out
        },
    }
