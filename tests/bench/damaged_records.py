"""Count what damaged records and damaged states break.

    python tests/bench/damaged_records.py [--records 500] [--states 300] [--seed 0]

Each damaged record is read, drawn by ``stabmon watch``, and written as a page; each damaged state
is given to ``load_state_dict``, which may raise a ``ValueError`` and nothing else, and must have
changed nothing then.
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import logging
import random
import tempfile
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from torch import nn

import stabmon
from stabmon._storage import strict_json
from stabmon.cli.reporting.printing import print_verdicts
from stabmon.cli.watching.layer_page import layer_lines
from stabmon.cli.watching.run import as_values
from stabmon.cli.watching.screen import Chosen, Screen
from stabmon.report.run.loading import load_runs
from stabmon.report.run.page import run_page
from stabmon.sinks.delivery.gaps import Gap
from stabmon.sinks.jsonl import GAPS, INTERVENTIONS, ISSUES, META, READINGS, JsonlSink
from stabmon.sinks.stored.run_tail import RunTail
from tests.support.damage import damaged, damaged_line, dumped
from tests.support.sample_records import LAYERS, issue, non_finite, reading
from tests.support.sample_records import META as SOUND_META

MARKUP = ("<script>alert(1)</script>", "]]>--><!--")
"""Names that must not stand in a page as they are."""


def sound_files() -> dict[str, str]:
    """Return the files of a small sound run."""
    with tempfile.TemporaryDirectory() as folder:
        sink, path = JsonlSink(), Path(folder)
        sink.open(
            path,
            {
                **SOUND_META,
                "started": "2026-01-31T12:00:00+00:00",
                "framework": "loop",
                "sampling": {"every": 10, "first": 1},
                "model": {"class": "GPT2"},
                "layers": dict.fromkeys(LAYERS, 4),
            },
        )
        for step in range(10, 60, 10):
            changes: dict[str, Any] = {"risk": dict.fromkeys(LAYERS, 0.5)}
            if step == 50:
                changes["non_finite"] = non_finite(50)
            sink.write_reading(reading(step, **changes), {})
            sink.write_issues([issue(step, head=step // 10 % 4), issue(step, None, layer=None)])
        sink.write_issues([replace(issue(50, head=1), state="closed", severity="info")])
        sink.write_intervention(
            {
                "intervention": "qk_clip",
                "action": "applied",
                "step": 30,
                "layer": LAYERS[0],
                "head": 1,
                "why": "logit_growth",
                "places": [[LAYERS[0], 1]],
                "before": {"norm": [1.0, 2.0]},
                "after": {"norm": [1.0, 1.5]},
                "note": "x",
            }
        )
        sink.write_gap(Gap("readings", 12, 18, 3, "OSError: disk full"))
        sink.close()
        return {each.name: each.read_text() for each in path.iterdir()}


def damage_files(files: dict[str, str], random_: random.Random) -> dict[str, bytes]:
    """Return the files with one damaged record, or a damaged meta.json."""
    name = random_.choice([READINGS, READINGS, ISSUES, ISSUES, INTERVENTIONS, META, GAPS])
    lines = files[name].splitlines()
    at = random_.randrange(len(lines))
    whole = [line.encode() for line in lines]
    whole[at] = damaged_line(lines[at], random_)
    return {
        **{each: text.encode() for each, text in files.items()},
        name: b"\n".join(whole) + b"\n",
    }


def show(folder: Path) -> str:
    """Read records in every way that stabmon has; return the page."""
    records = stabmon.read_records(folder)
    repr(records), records._repr_html_(), records.incidents
    for what in ("readings", "issues", "interventions", "incidents"):
        records.to_pandas(what)
    tail = RunTail(folder)
    state = tail.look()
    console = Console(file=io.StringIO(), width=80, force_terminal=True)
    for height in (None, 24):
        for line in Screen(state, Chosen(layer=0)).lines(80, height):
            console.print(line, soft_wrap=True, highlight=False)
    shown = console.file.getvalue()  # type: ignore[attr-defined]
    for control in ("\x1b[2J", "\x07", "\x00"):
        assert control not in shown, "a terminal was controlled by a record"
    for layer in [] if state.reading is None else state.reading.layers:
        layer_lines(layer, state.reading, tail.layer_history(layer), state.open_issues, 80, 24)
    strict_json.dumps(as_values(state))
    runs = load_runs([(folder, None)])
    page = run_page(runs)
    page.encode()
    for markup in MARKUP:
        assert markup not in page, f"{markup} stands in the page as it is"
    with contextlib.redirect_stdout(io.StringIO()):
        for as_json in (False, True):
            print_verdicts(runs, folder / "report.html", as_json)
    return page


def try_records(count: int, seed: int) -> Iterator[tuple[int, str, BaseException | None]]:
    """Yield number, file and uncaught error of each damaged record."""
    files = sound_files()
    for number in range(count):
        random_ = random.Random(f"{seed} {number}")
        with tempfile.TemporaryDirectory() as temporary:
            folder = Path(temporary)
            broken = damage_files(files, random_)
            for name, raw in broken.items():
                (folder / name).write_bytes(raw)
            name = next((n for n in broken if broken[n] != files[n].encode()), "none")
            try:
                show(folder)
            except Exception as error:
                yield number, name, error
            else:
                yield number, name, None


def make_monitor(folder: Path | None = None) -> tuple[Any, nn.Module, torch.optim.Optimizer]:
    """Return a small model under a monitor that guards."""
    torch.manual_seed(0)
    model = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True, dropout=0.0)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, config="guard", log_every=2, sinks=[], run_dir=folder
    )
    return monitor, model, optimizer


def stored_state() -> dict[str, Any]:
    """Return the state of a monitor after a few steps, as JSON gives it back."""
    monitor, model, optimizer = make_monitor()
    x = torch.randn(2, 5, 16)
    for step in range(12):
        loss = model(x * (1 + step)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        monitor.on_step(loss)
    monitor.apply(stabmon.interventions.INTERVENTIONS["lower_learning_rate"]())
    state: dict[str, Any] = monitor.state_dict()
    state["issues"] = [issue(4).to_dict()]
    monitor.close()
    found: dict[str, Any] = json.loads(json.dumps(state))
    return found


def digest(monitor: Any, model: nn.Module, optimizer: torch.optim.Optimizer) -> bytes:
    """Return everything that a state may change, as bytes."""
    parameters = b"".join(each.detach().numpy().tobytes() for each in model.parameters())
    rates = dumped([group["lr"] for group in optimizer.param_groups])
    return dumped(monitor.state_dict()) + parameters + rates


def try_states(count: int, seed: int) -> Iterator[tuple[int, str, BaseException | None]]:
    """Yield number, outcome and error (none where it was right) of each damaged state."""
    state = stored_state()
    with tempfile.TemporaryDirectory() as temporary:
        outside = Path(temporary) / "outside"
        outside.mkdir()
        kept = outside / "healthy-3-rank0.pt"
        kept.write_bytes(b"somebody's")
        for number in range(count):
            random_ = random.Random(f"{seed} state {number}")
            monitor, model, optimizer = make_monitor(Path(temporary) / "run")
            before = digest(monitor, model, optimizer)
            try:
                monitor.load_state_dict(damaged(state, random_))
            except ValueError:
                changed = digest(monitor, model, optimizer) != before
                error = RuntimeError("refused, and changed all the same") if changed else None
                yield number, "refused", error
            except Exception as error:
                yield number, "raised", error
            else:
                failed = dict(monitor.errors)
                yield number, "taken", RuntimeError(f"errors {failed}") if failed else None
            monitor.close()
        assert kept.read_bytes() == b"somebody's"


def main() -> int:
    """Print the number of damaged values, and of those that were not survived."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--records", type=int, default=500)
    parser.add_argument("--states", type=int, default=300)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--traceback", action="store_true")
    given = parser.parse_args()
    logging.disable(logging.CRITICAL)
    np.seterr(all="ignore")
    uncaught = 0
    for what, tries in (
        ("records", try_records(given.records, given.seed)),
        ("states", try_states(given.states, given.seed)),
    ):
        kinds: Counter[str] = Counter()
        wrong = 0
        for number, kind, error in tries:
            kinds[kind] += 1
            if error is not None:
                wrong += 1
                frames = traceback.extract_tb(error.__traceback__)
                at = next((f for f in reversed(frames) if "stabmon" in f.filename), None)
                where = "" if at is None else f" at {Path(at.filename).name}:{at.lineno}"
                print(
                    f"  {what} {number} ({kind}): {type(error).__name__}: {str(error)[:150]}{where}"
                )
                if given.traceback:
                    traceback.print_exception(error)
        counts = ", ".join(f"{kind} {count}" for kind, count in sorted(kinds.items()))
        print(f"damaged {what}: {sum(kinds.values())} ({counts}); uncaught: {wrong}")
        uncaught += wrong
    return min(uncaught, 1)


if __name__ == "__main__":
    raise SystemExit(main())
