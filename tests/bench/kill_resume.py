"""Kill guarded runs at random moments, resume them, and compare with the uninterrupted run.

    python tests/bench/kill_resume.py [--cycles 60] [--seed 0] [--loops trainer lightning loop "two ranks"]

Each cycle starts a run, ends it by SIGKILL, and resumes it from its newest checkpoint to its end.
The state of stabmon in that checkpoint is left as it is, cut off, overwritten, or removed; of two
ranks, for one alone. Compared are the records as ``read_records`` returns them: each step has one
reading, issues and interventions are the same at the same steps, and until an intervention goes by
a healthy state in memory, which ends with its process, every reading is the same to its last digit.
Without a state the history begins anew, so that issues and interventions may differ; the log must
say so, and no reading may be lost or doubled.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

import stabmon
from stabmon.sinks.jsonl import READINGS
from tests.support.killed_runs import FINAL, LOOPS, STATE, STEPS, checkpoints, step_of, train

DAMAGE = ("whole", "cut off", "garbage", "missing")
"""What is done to the state in the newest checkpoint."""
LIMIT = 90.0
"""Seconds after which a run hangs."""
_CONTEXT = multiprocessing.get_context("forkserver")
_PRELOADED = {"trainer": "transformers.trainer", "lightning": "lightning.pytorch"}
"""The framework of a loop, imported once for all of its runs."""


_BY_MEMORY = ("cap_query_key_norm", "rollback")
"""Interventions that go by a healthy state in memory."""
_SAID = ("empty history", "no state to go on from")


@dataclass
class Result:
    """What a run left, or how it differs from the uninterrupted one."""

    readings: Counter[str] = field(default_factory=Counter)
    """Each reading as text, without what a clock measured."""
    steps: Counter[int] = field(default_factory=Counter)
    issues: Counter[str] = field(default_factory=Counter)
    audit: Counter[str] = field(default_factory=Counter)
    finite: bool = False
    """The last weights are."""
    log: str = ""


@dataclass
class Cycle:
    """A run that was killed and resumed."""

    loop: str
    damage: str
    killed_after: int
    """Readings on disk as it was killed."""
    resumed_from: int
    """Step of the checkpoint; 0 for none, so that the run began anew."""
    ended: bool
    """The resumed run came to its end in time."""
    result: Result
    said: bool
    """The log of the resumed run says that there is no state to go on from."""


def cycles(loops: Sequence[str], count: int, seed: int, folder: Path) -> Iterator[Cycle]:
    """Kill and resume ``count`` runs, loop by loop in turn.

    Args:
        loops: names of loops.
        count: number of cycles.
        seed: of the moments and of the damage.
        folder: where the runs lie.
    """
    for number in range(count):
        loop, drawn = loops[number % len(loops)], random.Random(f"{seed} {number}")
        turn = number // len(loops)
        # every second state is whole
        damage = "whole" if turn % 2 == 0 else DAMAGE[1 + turn // 2 % 3]
        own = folder / f"{number}"
        own.mkdir()
        yield _cycle(loop, damage, own, drawn)


def run_through(loop: str, folder: Path) -> Result:
    """Return what an uninterrupted run leaves."""
    assert _ends(_start(loop, folder)), f"{loop} does not end: {folder}"
    return result_of(folder)


def result_of(folder: Path) -> Result:
    """Return what the newest run in a folder has left."""
    run = stabmon.read_records(folder).runs[-1]
    by_memory = [each["step"] for each in run.interventions if each["intervention"] in _BY_MEMORY]
    exact = [each for each in run.readings if each.step <= min(by_memory, default=STEPS)]
    weights = [torch.load(path) for path in folder.glob(f"{FINAL}-*.pt")]
    return Result(
        Counter(_text(each.to_dict()) for each in exact),
        Counter(each.step for each in run.readings),
        Counter(
            f"{each.step} {each.layer} {each.head} {each.issue_type} {each.severity} {each.state}"
            for each in run.issues
        ),
        Counter(
            " ".join(str(each.get(name)) for name in ("step", "action", "intervention", "layer"))
            for each in run.interventions
        ),
        bool(weights) and all(each.isfinite().all() for own in weights for each in own.values()),
        "".join(path.read_text() for path in sorted(folder.glob("log-*.txt"))),
    )


def _cycle(loop: str, damage: str, folder: Path, drawn: random.Random) -> Cycle:
    processes = _start(loop, folder)
    wanted, pause = drawn.randrange(1, STEPS), drawn.uniform(0, 0.05)
    readings, began = folder / "stabmon" / READINGS, time.monotonic()
    while _lines(readings) < wanted and all(each.is_alive() for each in processes):
        assert time.monotonic() - began < LIMIT, f"{loop} does not train: {folder}"
        time.sleep(0.005)
    time.sleep(pause)
    drawn.shuffle(processes)
    for each in processes:
        with suppress(ProcessLookupError):
            os.kill(each.pid, signal.SIGKILL)
        time.sleep(drawn.uniform(0, 0.3) * (len(processes) > 1))
    for each in processes:
        each.join()
    killed_after = _lines(readings)
    found = checkpoints(loop, folder)
    if found and damage != "whole":
        _damage(loop, found[-1], damage, drawn)
    for log in folder.glob("log-*.txt"):
        log.unlink()
    ended = _ends(_start(loop, folder))
    result = result_of(folder)
    step = step_of(found[-1]) if found else 0
    said = any(words in result.log for words in _SAID)
    return Cycle(loop, damage, killed_after, step, ended, result, said)


def _start(loop: str, folder: Path) -> list[Any]:
    """Start the processes of a run."""
    ranks = 2 if loop == "two ranks" else 1
    store = str(folder / f"store-{time.monotonic_ns()}") if ranks > 1 else ""
    processes = [
        _CONTEXT.Process(target=_run, args=(loop, str(folder), number, store))
        for number in range(ranks)
    ]
    for each in processes:
        each.start()
    return processes


def _run(loop: str, folder: str, number: int, store: str) -> None:
    output = os.open(Path(folder, f"output-{number}.txt"), os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    train(loop, folder, number, store)


def _ends(processes: Sequence[Any]) -> bool:
    """Return whether all processes come to a good end in time; end those that do not."""
    until = time.monotonic() + LIMIT
    for each in processes:
        each.join(max(0.0, until - time.monotonic()))
    for each in processes:
        if each.is_alive():
            each.kill()
            each.join()
    return all(each.exitcode == 0 for each in processes)


def _lines(path: Path) -> int:
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def _damage(loop: str, checkpoint: Path, damage: str, drawn: random.Random) -> None:
    """Damage the state in a checkpoint; of two ranks, that of one."""
    if loop == "lightning":
        stored = torch.load(checkpoint, weights_only=False)
        key = next(each for each in stored["callbacks"] if "Stability" in each)
        state = stored["callbacks"].pop(key)
        if damage == "cut off":
            stored["callbacks"][key] = dict(
                list(state.items())[: drawn.randrange(1, len(state) // 2)]
            )
        elif damage == "garbage":
            stored["callbacks"][key] = dict.fromkeys(state, "\x00garbage")
        torch.save(stored, checkpoint)
        return
    names = [STATE] if loop != "two ranks" else [STATE, f"1-{STATE}"]
    path = checkpoint / drawn.choice(names)
    raw = path.read_bytes()
    if damage == "cut off":
        path.write_bytes(raw[: drawn.randrange(len(raw))])
    elif damage == "garbage":
        path.write_bytes(drawn.randbytes(len(raw)))
    else:
        path.unlink()


def _text(values: dict[str, Any]) -> str:
    """Return a reading as text, without what a clock measured."""

    def plain(value: Any) -> Any:
        return value.tolist() if hasattr(value, "tolist") else str(value)

    timeless = {name: each for name, each in values.items() if name != "overhead_fraction"}
    return json.dumps(timeless, default=plain, sort_keys=True)


HEADS = (
    *("loop", "state", "cycles", "begun anew", "not ended", "readings lost", "doubled", "other"),
    *("issues lost", "doubled", "audit lost", "doubled", "not finite", "said"),
)


def row_of(found: Sequence[Cycle], reference: Result) -> list[int]:
    """Return the numbers of a row of the table, for cycles of one kind."""

    def lost(name: str) -> int:
        whole: Counter[Any] = getattr(reference, name)
        return sum((whole - getattr(each.result, name)).total() for each in found)

    def doubled(name: str) -> int:
        whole: Counter[Any] = getattr(reference, name)
        return sum((getattr(each.result, name) - whole).total() for each in found)

    return [
        len(found),
        sum(not each.resumed_from for each in found),
        sum(not each.ended for each in found),
        lost("steps"),
        doubled("steps"),
        doubled("readings"),
        lost("issues"),
        doubled("issues"),
        lost("audit"),
        doubled("audit"),
        sum(not each.result.finite for each in found),
        sum(each.said for each in found),
    ]


def is_right(damage: str, row: Sequence[int]) -> bool:
    """Return whether a row holds what it must."""
    count, anew, not_ended, lost, doubled, *others, said = row
    if not_ended or lost or doubled:
        return False
    return said == count - anew if damage != "whole" else not any(others) and not said


def main() -> int:
    """Run the cycles and print the table."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cycles", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--loops", nargs="+", choices=LOOPS, default=list(LOOPS))
    parser.add_argument("--keep", type=Path, help="folder to keep the runs in")
    given = parser.parse_args()
    os.environ["OMP_NUM_THREADS"] = "1"
    frameworks = [_PRELOADED[each] for each in given.loops if each in _PRELOADED]
    _CONTEXT.set_forkserver_preload(["tests.support.killed_runs", *frameworks])
    table = Table(*HEADS, title=f"seed {given.seed}", title_justify="left")
    all_right = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = given.keep or Path(temporary)
        references = {}
        for loop in given.loops:
            own = folder / f"uninterrupted {loop}"
            own.mkdir(parents=True)
            references[loop] = run_through(loop, own)
        found = []
        for each in cycles(given.loops, given.cycles, given.seed, folder):
            found.append(each)
            row = row_of([each], references[each.loop])
            words = "as it must be" if is_right(each.damage, row) else f"OTHER: {row}"
            print(
                f"{len(found)}: {each.loop}, state {each.damage}, killed after "
                f"{each.killed_after} readings, resumed from {each.resumed_from}: {words}",
                file=sys.stderr,
                flush=True,
            )
    for loop in given.loops:
        for damage in DAMAGE:
            these = [each for each in found if (each.loop, each.damage) == (loop, damage)]
            if these:
                row = row_of(these, references[loop])
                all_right = all_right and is_right(damage, row)
                table.add_row(loop, damage, *map(str, row))
    Console(width=150).print(table)
    return 0 if all_right else 1


if __name__ == "__main__":
    sys.exit(main())
