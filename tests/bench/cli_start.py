"""Print the CPU time of importing stabmon and of each command's help, beside another checkout's.

python tests/bench/cli_start.py [--beside FOLDER] [--times 7]

The least of several runs counts: other work on the machine only adds. The aim is below 0.5 s for
each help, of which the interpreter itself takes 0.02 and typer, with pydantic, 0.25.
"""

import argparse
import resource
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
MAIN = "from stabmon.cli import main; main()"
CASES = {
    "python": ["-c", "pass"],
    "import stabmon": ["-c", "import stabmon"],
    "stabmon": ["-c", MAIN],
    **{
        f"stabmon {name} --help".replace("  ", " "): ["-c", MAIN, *name.split(), "--help"]
        for name in ("", "check", "train", "report", "watch", "wandb-workspace", "analyze", "list")
    },
}


def cpu_seconds(arguments: list[str], checkout: Path, times: int) -> float:
    """Return the least user and system time of ``times`` runs of Python, in seconds."""
    found = []
    for _ in range(times):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        # python -c looks for modules in its folder first
        subprocess.run([sys.executable, *arguments], capture_output=True, cwd=checkout)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found)


def main() -> None:
    """Print a row for each case."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--beside", type=Path, help="another checkout, in a column of its own")
    parser.add_argument("--times", type=int, default=7)
    args = parser.parse_args()
    checkouts = [ROOT, *([args.beside.resolve()] if args.beside else [])]
    print(f"{'CPU seconds':34}" + "".join(f"{each.name:>14}" for each in checkouts))
    for case, arguments in CASES.items():
        row = [cpu_seconds(arguments, each, args.times) for each in checkouts]
        print(f"{case:34}" + "".join(f"{seconds:14.3f}" for seconds in row), flush=True)


if __name__ == "__main__":
    main()
