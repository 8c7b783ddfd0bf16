"""Measure pages of runs: bytes, seconds to write and to open, milliseconds a slider step.

python tests/bench/run_page.py [--out FOLDER] [RUN ...]

Without runs, records of 24 layers × 16 heads × 2400 samples are made first: four signals, then the
eleven that are measured by default. Pictures of every page, at desktop and phone width, go to the
folder.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from playwright.sync_api import sync_playwright

from stabmon.config import StabilityConfig
from stabmon.records import Reading, StabilityIssue
from stabmon.report.run.loading import load_runs
from stabmon.report.run.page import write_page
from stabmon.sinks.jsonl import JsonlSink
from tests.support.browser_pages import FLAGS

FOUR = ("normalized_entropy", "max_logit", "hnf_log_curvature", "precision_bits")
SLIDE = """() => {
  const slider = document.getElementById("step"), times = [];
  if (!slider) return null;
  for (let i = 0; i < 20; i++) {
    slider.value = Math.floor(slider.max * i / 20);
    const start = performance.now();
    slider.dispatchEvent(new Event("input"));
    times.push(performance.now() - start);
  }
  return Math.max(...times);
}"""
"""Milliseconds of the slowest of 20 steps of the slider, over the whole run."""


def make_records(
    folder: Path, signals: tuple[str, ...], layers: int = 24, heads: int = 16, samples: int = 2400
) -> None:
    """Write records whose entropies fall and scores grow with noise, and an alarm late."""
    rng = np.random.default_rng(0)
    (folder / "stabmon").mkdir(parents=True)
    sink = JsonlSink()
    sink.open(folder / "stabmon", {"config": {"log_every": 50}})
    pace = rng.uniform(0.5, 2.0, (layers, heads))
    for at in range(samples):
        share = at / samples
        falls = np.exp(-pace * share * 2) * rng.uniform(0.9, 1.0, pace.shape)
        grows = 2 * np.exp(pace * share * 2) * rng.uniform(0.9, 1.1, pace.shape)
        values = {name: falls if "entropy" in name else grows for name in signals}
        sink.write_reading(
            Reading(
                50 * (at + 1),
                8 / (1 + at / 100) + rng.normal(0, 0.05),
                {
                    f"model.layers.{n}.self_attn": {name: each[n] for name, each in values.items()}
                    for n in range(layers)
                },
                learning_rate=3e-4,
            ),
            {},
        )
    for layer in range(layers // 2):
        evidence: dict[str, Any] = {"how": "driven", "gain_times": 3.0, "since_step": 90_000}
        name = f"model.layers.{layer}.self_attn"
        sink.write_issue(
            StabilityIssue(100_000, name, None, "logit_growth", "error", 60.0, 50.0, "", evidence)
        )
    sink.close()


def main() -> None:
    """Make, write, open and photograph the pages, and print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--out", type=Path, default=Path(tempfile.mkdtemp()))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pages = [[run] for run in args.runs] + ([args.runs] if len(args.runs) > 1 else [])
    if not pages:
        for name, signals in (("four", FOUR), ("default", tuple(StabilityConfig().signals))):
            make_records(args.out / name, signals)
            pages.append([args.out / name])
    binary = shutil.which("chromium")
    print(f"{'page':34} {'MB':>6} {'read':>7} {'write':>8} {'open s':>7} {'slide ms':>9}")
    with sync_playwright() as started:
        browser = started.chromium.launch(executable_path=binary, args=FLAGS)
        for folders in pages:
            measure(folders, args.out, browser)
        browser.close()
    print(f"pictures in {args.out}")


def measure(folders: list[Path], out: Path, browser: Any) -> None:
    """Write and open one page; print CPU seconds, and the best of four openings."""
    name = "_".join(folder.name for folder in folders)
    page = out / f"{name}.html"
    began = time.process_time()
    runs = load_runs([(folder, None) for folder in folders])
    read = time.process_time()
    write_page(runs, page)
    written = time.process_time()
    opening, slide = [], []
    for width, scheme in ((1200, "light"), (1200, "dark"), (360, "light"), (360, "dark")):
        tab = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        start = time.perf_counter()
        tab.goto(page.absolute().as_uri())
        if runs[0].signals.heads:
            tab.wait_for_function("document.documentElement.dataset.ready === 'yes'")
            opening.append(time.perf_counter() - start)
            slide.append(tab.evaluate(SLIDE))
        tab.screenshot(path=out / f"{name}_{width}_{scheme}.png", full_page=True)
        tab.close()
    print(
        f"{name[:34]:34} {page.stat().st_size / 1e6:6.2f} {read - began:7.1f} "
        f"{written - read:8.1f} {min(opening, default=0):7.2f} {min(slide, default=0):9.0f}"
    )


if __name__ == "__main__":
    main()
