"""Run every script of a folder of stated cases and print each outcome.

python tests/bench/cases.py FOLDER                 scripts ``NN_*.py``, in sub-folders too
python tests/bench/cases.py FOLDER --only 07 cat   some of them, by the beginning of their names

A script ends in a line with PASS or FAIL, or prints values for a person to judge; those are shown
whole. Each runs in a process of its own, with the stabmon that this interpreter imports.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

SHARED = ("common.py",)
"""Names of files without a case."""


def main() -> int:
    """Print the table. Returns 1 where a script says FAIL, raises or takes too long."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--only", nargs="+", default=[], metavar="NAME", help="beginnings of names")
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds a script may take")
    args = parser.parse_args()
    scripts = [path for path in sorted(args.folder.rglob("*.py")) if path.name not in SHARED]
    scripts = [path for path in scripts if not args.only or path.name.startswith(tuple(args.only))]
    if not scripts:
        parser.error(
            f"{args.folder} holds no script{' that begins so' if args.only else ''}: give the "
            "folder of the cases"
        )
    table = Table(title="cases", title_justify="left")
    for name in ("script", "verdict", "seconds", "what it printed"):
        table.add_column(name, overflow="fold")
    failed = 0
    for path in scripts:
        began = time.monotonic()
        verdict, said = run(path, args.timeout)
        failed += verdict in ("FAIL", "raised", "too slow")
        table.add_row(
            str(path.relative_to(args.folder)), verdict, f"{time.monotonic() - began:.0f}", said
        )
        print(f"{path.name}: {verdict}", file=sys.stderr, flush=True)
    Console(width=max(150, Console().width)).print(table)
    print(f"{failed} of {len(scripts)} scripts failed, raised or took too long")
    return int(failed > 0)


def run(path: Path, timeout: float) -> tuple[str, str]:
    """Run a script; return its verdict and output.

    PASS, FAIL, values, raised or too slow; the last line where it has a verdict, else all of the
    output.
    """
    try:
        done = subprocess.run(
            [sys.executable, path.name],
            cwd=path.parent,
            capture_output=True,
            text=True,
            timeout=timeout,
            env={**os.environ, "PYTHONDONTWRITEBYTECODE": "1"},
        )
    except subprocess.TimeoutExpired:
        return "too slow", f"more than {timeout:.0f} s"
    lines = [line for line in done.stdout.splitlines() if line.strip()]
    if lines and lines[-1].rstrip().endswith(("PASS", "FAIL")):
        return lines[-1].rstrip()[-4:], lines[-1].rstrip()[:-5]
    if done.returncode:
        return "raised", (done.stderr.strip().splitlines() or ["no word"])[-1]
    return "values", "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
