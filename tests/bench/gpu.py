"""Check and measure stabmon on one CUDA GPU.

    python tests/bench/gpu.py --out gpu.json           every section, about five minutes on an H100
    python tests/bench/gpu.py --only exactness cost    some sections
    python tests/bench/gpu.py --device cpu             in small: a test of the checks themselves

Prints a line for each check: section, name, PASS, FAIL or SKIP, seconds, and figures. Each section
is a process of its own with a hard time limit, so that neither an error, nor a lost device, nor a
deadlock stops the others. Sections run several at a time; ``cost`` measures time and has the device
to itself, last. Exit status 1 if any check fails. Nothing is downloaded; checks that need a missing
package are skipped and name it.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import importlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import subprocess
import sys
import tempfile
import threading
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

QUIET = {
    "HF_HUB_OFFLINE": "1",
    "HF_HUB_DISABLE_TELEMETRY": "1",
    "WANDB_MODE": "offline",
    "WANDB_SILENT": "true",
    "TRANSFORMERS_VERBOSITY": "error",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONFAULTHANDLER": "1",
}
SECTIONS = {
    "exactness": 90,
    "neutrality": 170,
    "guard": 150,
    "check": 90,
    "frameworks": 100,
    "non_finite": 60,
    "cost": 240,
}
"""Section, ordered by importance -> seconds it may take at most."""
ALONE = {"cost": 115}
"""Sections that measure time -> seconds kept for them."""
ROOT = Path(__file__).parents[2]
_printing = threading.Lock()


def main() -> int:
    """Run the sections and print the table. Returns 1 if any check failed."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only",
        nargs="+",
        choices=SECTIONS,
        default=list(SECTIONS),
        metavar="NAME",
        help=", ".join(SECTIONS),
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--budget", type=float, help="seconds in all; 300 on a GPU, else 1200")
    parser.add_argument("--jobs", type=int, help="sections at a time; 3 on a GPU, else 1")
    parser.add_argument("--out", type=Path, help="write all figures there as JSON")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return run_section(args.only[0], args.device, args.budget, args.child)
    args.budget = args.budget or (300.0 if args.device == "cuda" else 1200.0)
    began = time.monotonic()
    about = describe(args.device)
    print(", ".join(f"{name} {value}" for name, value in about.items()), flush=True)
    if args.device == "cuda" and about["card"] == "none":
        print(
            "error: torch sees no CUDA device: give --device cpu to test the checks themselves",
            file=sys.stderr,
        )
        return 2
    logs: dict[str, str] = {}
    rows = run_all(args, began, logs)
    failed, skipped = (
        [row for row in rows if row["result"] == result] for result in ("FAIL", "SKIP")
    )
    seconds = time.monotonic() - began
    passed = len(rows) - len(failed) - len(skipped)
    print(
        f"{passed} passed, {len(failed)} failed, {len(skipped)} skipped; {seconds:.0f} s",
        flush=True,
    )
    for row in failed:
        print(f"  failed: {row['section']}: {row['name']}: {row['words']}")
    if args.out:
        args.out.write_text(
            json.dumps(
                {"about": about, "seconds": seconds, "rows": rows, "logs": logs},
                indent=1,
                allow_nan=False,
            )
        )
    return int(bool(failed))


def describe(device: str) -> dict[str, Any]:
    """The card, and the versions of what matters, found without starting CUDA in this process."""
    code = (
        "import torch, json; c = torch.cuda.is_available(); "
        "print(json.dumps([torch.__version__, torch.version.cuda, "
        "torch.cuda.get_device_name(0) if c else 'none', torch.cuda.device_count() if c else 0]))"
    )
    told = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=120
    )
    torch_version, cuda, card, count = (
        json.loads(told.stdout.splitlines()[-1]) if told.returncode == 0 else ("?", "?", "none", 0)
    )
    about = {"card": card, "cards": count, "device": device, "torch": torch_version, "cuda": cuda}
    about["python"] = ".".join(map(str, sys.version_info[:3]))
    for package in ("transformers", "lightning", "accelerate", "numpy", "triton"):
        try:
            about[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            about[package] = "none"
    needed = {
        "yaml": "pyyaml",
        "rich": "rich",
        "typer": "typer",
        "safetensors": "safetensors",
        "numpy": "numpy",
    }
    missing = [name for module, name in needed.items() if importlib.util.find_spec(module) is None]
    return about | ({"missing": " ".join(missing)} if missing else {})


def run_all(args: argparse.Namespace, began: float, logs: dict[str, str]) -> list[dict[str, Any]]:
    """Each section in a process: several together, then those that measure time."""
    jobs = args.jobs or (3 if args.device == "cuda" else 1)
    together = [name for name in SECTIONS if name in args.only and name not in ALONE]
    alone = [name for name in SECTIONS if name in args.only and name in ALONE]
    kept = sum(ALONE[name] for name in alone)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:

        def one(name: str, reserve: float) -> list[dict[str, Any]]:
            left = args.budget - (time.monotonic() - began) - reserve
            most = SECTIONS[name] * (1 if args.device == "cuda" else 4)
            return run_child(
                name, args.device, min(most, left), Path(folder) / f"{name}.jsonl", logs
            )

        with ThreadPoolExecutor(jobs) as pool:
            for found in pool.map(lambda name: one(name, kept), together):
                rows += found
        for name in alone:
            rows += one(name, 0.0)
    return rows


def run_child(
    name: str, device: str, seconds: float, file: Path, logs: dict[str, str]
) -> list[dict[str, Any]]:
    """Run a section in a process of its own, and read its rows even where it had to be ended."""
    if seconds < 15:
        row = _row(name, "section", "SKIP", "the budget is used up")
        with _printing:
            print(f"{name:<12}{'section':<50} SKIP         {row['words']}", flush=True)
        return [row]
    command = [
        sys.executable,
        __file__,
        "--only",
        name,
        "--device",
        device,
        "--budget",
        str(seconds - 8),
        "--child",
        str(file),
    ]
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = os.environ | QUIET | {"PYTHONPATH": os.pathsep.join(paths)}
    if name not in ALONE:  # asked for by deterministic algorithms
        environment["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"
    process = subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    errors: list[str] = []

    def read_errors() -> None:
        assert process.stderr is not None
        errors.extend(process.stderr)

    def read_lines() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            with _printing:
                print(line, end="", flush=True)

    readers = [threading.Thread(target=target, daemon=True) for target in (read_errors, read_lines)]
    for reader in readers:
        reader.start()
    ended = ""
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, 9)  # its own session: its compile workers too
        process.wait()
        ended = f"ended after {seconds:.0f} s"
    for reader in readers:
        reader.join(5)
    logs[name] = "".join(errors[-400:])
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    running = rows.pop()["name"] if rows and rows[-1]["result"] == "RUNNING" else "its start"
    if ended or process.returncode:
        ended = ended or f"exit status {process.returncode}"
        row = _row(
            name,
            "section",
            "FAIL",
            f"{ended}, in {running}: {' | '.join(each.strip() for each in errors[-4:])[:400]}",
        )
        rows.append(row)
        with _printing:
            print(f"{name:<12}{'section':<50} FAIL         {row['words']}", flush=True)
            print(
                "".join(f"            | {each.rstrip()}\n" for each in errors[-12:]),
                end="",
                flush=True,
            )
    return [row for row in rows if row["result"] != "RUNNING"]


def _row(section: str, name: str, result: str, words: str) -> dict[str, Any]:
    return {
        "section": section,
        "name": name,
        "result": result,
        "words": words,
        "seconds": 0.0,
        "figures": {},
        "trace": "",
    }


def run_section(name: str, device: str, budget: float, file: Path) -> int:
    """Run one section here; a line of JSON for each check as it begins and as it ends."""
    deadline = time.monotonic() + budget
    warnings.filterwarnings("ignore")
    import torch

    from tests.bench.gpu_checks import harness

    for logger in ("lightning.pytorch", "lightning", "transformers"):
        logging.getLogger(logger).setLevel(logging.ERROR)
    if device == "cpu":
        torch.set_num_threads(1)
    place = harness.Place(
        torch.device(device, 0) if device == "cuda" else torch.device("cpu"),
        device == "cpu",
        deadline,
    )
    checks = importlib.import_module(f"tests.bench.gpu_checks.{name}").checks

    def announced(at: harness.Place) -> Any:
        for check in checks(at):
            _write(file, _row(name, check[0], "RUNNING", ""))
            yield check

    with warnings.catch_warnings():
        for row in harness.run(name, announced, place):
            _replace_last(file, row.plain())
            print(row.line(), flush=True)
    return 0


def _write(file: Path, row: dict[str, Any]) -> None:
    with file.open("a") as stream:
        stream.write(json.dumps(row, allow_nan=False) + "\n")


def _replace_last(file: Path, row: dict[str, Any]) -> None:
    """Put the result of a check where it was announced."""
    lines = file.read_text().splitlines() if file.exists() else []
    if lines and json.loads(lines[-1])["result"] == "RUNNING":
        lines.pop()
    file.write_text("".join(f"{line}\n" for line in [*lines, json.dumps(row, allow_nan=False)]))


if __name__ == "__main__":
    sys.exit(main())
