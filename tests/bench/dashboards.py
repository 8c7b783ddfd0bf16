"""Count what dashboards get of a run, time their sinks, and take pictures of them.

A small GPT-2 trains at 30 times the rate that fits; now and then an intervention is applied and
taken back. Printed for models of 4 and 32 layers: issues and interventions recorded, and found
again in TensorBoard (by its own server, as its page gets them) and in the offline run of Weights &
Biases; tags and panels; milliseconds that a reading takes in each sink, and a picture of all heads
alone. ``--out`` keeps the pictures: every image of the two dashboards, and TensorBoard's page in
Chromium. The page of Weights & Biases cannot be had offline.
"""

if not __package__:
    import on_path  # noqa: F401

import argparse
import contextlib
import json
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
import urllib.parse
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import stabmon
from stabmon.records import Reading
from stabmon.sinks import SINKS, Sink
from stabmon.sinks.dashboards.head_pictures import HeadPictures
from stabmon.sinks.reader import read_records
from stabmon.tiny.corpus import load_corpus
from tests.support import wandb_files

LENGTH, BATCH, RATE = 64, 8, 3e-2
PINS = [
    {"plugin": "scalars", "tag": tag}
    for tag in (
        "stability/risk",
        "stability/issues_open",
        "attention/max_logit/max",
        "attention/normalized_entropy/min",
    )
]
"""Cards at the top of TensorBoard's first tab, as in docs/records.md."""


class Timed(Sink):
    """A sink whose readings are timed."""

    def __init__(self, sink: Sink) -> None:
        self.sink, self.seconds = sink, []  # type: ignore[var-annotated]

    def __getattribute__(self, name: str) -> Any:
        if name in ("sink", "seconds", "__class__"):
            return object.__getattribute__(self, name)
        method = getattr(self.sink, name)
        if name != "write_reading":
            return method

        def write_reading(*arguments: Any) -> None:
            start = time.process_time()
            method(*arguments)
            self.seconds.append(time.process_time() - start)

        return write_reading


def train(folder: Path, *, layers: int, steps: int, every: int) -> dict[str, Timed]:
    """Train one model and return its timed sinks."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true"}
    torch.manual_seed(0)
    corpus = load_corpus(block=LENGTH)
    config = GPT2Config(
        n_embd=64,
        n_layer=layers,
        n_head=4,
        n_positions=LENGTH,
        vocab_size=256,
        loss_type="ForCausalLM",
        bos_token_id=0,
        eos_token_id=0,
        use_cache=False,
    )
    model = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE)
    sinks = {name: Timed(SINKS[name]()) for name in ("tensorboard", "wandb")}
    with stabmon.AttentionStabilityMonitor(
        model,
        optimizer,
        log_every=every,
        schedule="fixed",
        sinks=["jsonl", *sinks.values()],
        run_dir=folder,
    ) as monitor:
        applied = None
        for rows in corpus.stream(steps, BATCH, seed=0):
            batch = corpus.train[rows]
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            diagnosis = monitor.on_step(loss)
            if applied is not None and monitor.step % 7 == 0:
                applied.undo("to show it")
                applied = None
            elif applied is None and diagnosis is not None and monitor.step % 40 == 0:
                intervention = monitor.get_intervention(diagnosis)
                applied = None if intervention is None else monitor.apply(intervention)
    return sinks


@contextlib.contextmanager
def tensorboard_at(folder: Path, *options: str) -> Iterator[str]:
    """Serve a folder by TensorBoard; yield the address once it has loaded the events."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    call = [sys.executable, "-m", "tensorboard.main", "--logdir", str(folder), "--port", str(port)]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    server = subprocess.Popen([*call, *options], **quiet)  # type: ignore[call-overload]
    address = f"http://localhost:{port}"
    try:
        deadline = time.monotonic() + 120
        while time.monotonic() < deadline:
            time.sleep(1)
            with contextlib.suppress(OSError, ValueError):
                if get(address, "text/tags"):
                    break
        time.sleep(5)
        yield address
    finally:
        server.terminate()
        server.wait()


def get(address: str, route: str, **query: str) -> Any:
    asked = f"{address}/data/plugin/{route}?{urllib.parse.urlencode(query)}"
    with urllib.request.urlopen(asked) as answer:
        return json.load(answer)


def texts(address: str) -> dict[str, list[str]]:
    """Every text that TensorBoard's page gets, by tag."""
    found = {}
    for run, tags in get(address, "text/tags").items():
        for tag in tags:
            shown = get(address, "text/text", run=run, tag=tag)
            name = tag.removesuffix("/text_summary")
            found[name] = [re.sub(r"<[^>]*>", "", each["text"]) for each in shown]
    return found


def heads_of(text: str) -> set[int]:
    """The heads in ``heads 0, 2–4``."""
    found: set[int] = set()
    for first, last in re.findall(r"(\d+)(?:–(\d+))?", text):
        found.update(range(int(first), int(last or first) + 1))
    return found


def issues_of(story: str) -> set[tuple[Any, ...]]:
    """(step, severity, state, type, layer, head) of every issue in a story."""
    pattern = r"^(?:- )?step (\d+), (?:\*\*)?(\w+)(?:\*\*)?, (\w+): (\w+), (.+?)(?: heads? (.+))?$"
    found: set[tuple[Any, ...]] = set()
    for step, severity, state, name, layer, heads in re.findall(pattern, story, re.MULTILINE):
        place = (int(step), severity, state, name, None if layer == "run" else layer)
        found |= {(*place, head) for head in heads_of(heads)} if heads else {(*place, None)}
    return found


def print_counts(folder: Path, wandb_file: str, files: Path) -> None:
    records = read_records(folder)
    recorded = {
        (each.step, each.severity, each.state, each.issue_type, each.layer, each.head)
        for each in records.issues
    }
    print(f"  recorded: {len(recorded)} issues, {len(records.interventions)} interventions")
    for options in (("--load_fast", "true"), ("--load_fast", "false")):
        with tensorboard_at(folder / "stabmon" / "tensorboard", *options) as address:
            shown = texts(address)
            story = shown["stability/history"][-1]
            issues = len(recorded & issues_of(story))
            interventions = story.count("intervention at step")
            kept = len(shown["stability/issues"])
            scalars = get(address, "scalars/tags")
            images = get(address, "images/tags")
            print(
                f"  TensorBoard {' '.join(options)}: {issues} issues and {interventions} "
                f"interventions in the story; {kept} of "
                f"{len({each.step for each in records.issues})} texts of a step"
            )
    tags = [tag for found in scalars.values() for tag in found]
    print(
        f"  TensorBoard: {len(tags)} scalar tags {dict(Counter(t.split('/')[0] for t in tags))}, "
        f"{sum(len(found) for found in images.values())} images, {len(shown)} texts"
    )
    names, panels = wandb_files.panels(wandb_file)
    issues = len(wandb_files.table(wandb_file, files, "stability/issues"))
    done = len(wandb_files.table(wandb_file, files, "stability/interventions"))
    print(
        f"  W&B: {issues} issues and {done} interventions in the tables; {len(names)} names, "
        f"{len(panels)} panels {dict(Counter(each.split('/')[0] for each in sorted(panels)))}, "
        f"{len(wandb_files.of_kind(wandb_file, 'alert'))} alerts"
    )
    for each in sorted(panels):
        print(f"    {each}")


def time_pictures() -> None:
    """Print the time of a picture at 32 × 32 heads, by the length of its history."""
    rng = np.random.default_rng(0)
    for length in (10, 400):
        pictures = HeadPictures(each_signal=False, every=10**9)
        for step in range(1, length + 1):
            layers = {
                f"model.layers.{layer}.self_attn": {
                    "normalized_entropy": rng.random(32),
                    "max_logit": 10 * rng.random(32),
                }
                for layer in range(32)
            }
            drawn = pictures.add(Reading(step, None, layers))
        taken = []
        for step in range(3):
            pictures.mark("alarm", step)
            start = time.process_time()
            drawn = pictures.draw()
            taken.append(time.process_time() - start)
        print(
            f"picture of 32 × 32 heads, {length} readings: {1e3 * min(taken):.0f} ms of CPU, "
            f"{'×'.join(map(str, drawn[0].image.shape))}"
        )


def photograph(folder: Path, out: Path) -> None:
    """Take pictures of TensorBoard's tabs."""
    from playwright.sync_api import sync_playwright

    with (
        tensorboard_at(folder / "stabmon" / "tensorboard") as address,
        sync_playwright() as started,
    ):
        browser = started.chromium.launch(
            executable_path="/usr/bin/chromium", args=["--no-sandbox"]
        )
        page = browser.new_page(viewport={"width": 1400, "height": 900})
        tabs = {each: f"#{each}" for each in ("timeseries", "custom_scalars", "images", "text")}
        for name, place in (
            tabs | {"pinned": f"?pinnedCards={json.dumps(PINS)}#timeseries"}
        ).items():
            page.goto("about:blank")
            page.goto(f"{address}/{place}", timeout=180_000)
            page.wait_for_timeout(15_000)
            page.screenshot(path=str(out / f"tensorboard_{name}.png"), timeout=180_000)
        browser.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, nargs="+", default=[4, 32])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--every", type=int, default=5)
    parser.add_argument("--out", type=Path, help="folder for pictures")
    args = parser.parse_args()
    torch.set_num_threads(1)
    time_pictures()
    for layers in args.layers:
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            sinks = train(folder, layers=layers, steps=args.steps, every=args.every)
            print(f"{layers} layers of 4 heads, {args.steps} steps:")
            for name, timed in sinks.items():
                taken = 1e3 * np.array(timed.seconds)
                print(
                    f"  {name}: {np.median(taken):.1f} ms of CPU a reading (median), "
                    f"{taken.mean():.1f} (mean), {taken.max():.0f} (largest)"
                )
            (run,) = sorted(Path(folder / "wandb").glob("offline-run-*"))
            (file,) = run.glob("*.wandb")
            print_counts(folder, str(file), run / "files")
            if args.out:
                kept = args.out / f"{layers}_layers"
                kept.mkdir(parents=True, exist_ok=True)
                for image in (run / "files").rglob("*.png"):
                    (kept / image.name).write_bytes(image.read_bytes())
                photograph(folder, kept)


if __name__ == "__main__":
    sys.exit(main())
