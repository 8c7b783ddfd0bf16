"""Record every choice of guard in the tests, to show that a change of structure changes none.

    python tests/bench/record_choices.py OUT.json [PATH ...]
    python tests/bench/record_choices.py --compare BEFORE.json AFTER.json

The first runs the tests of interventions and of guarding (or PATH) and writes
``{test: [[action, intervention, step, places, settings], ...]}``, one row for each audit record.
The second compares two such files: tests are matched by their whole name, else by function and
parameters, since files move; exit status 1 where a choice differs or a test has gone. Records are
taken from every class of stabmon that has an ``audit`` field, whatever its name and module.
Processes that a test starts are not seen.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
TESTS = ("tests/interventions", "tests/guard")
OUT = "STABMON_CHOICES"
"""The variable that names the file to write, for the plugin."""
Row = list[Any]
Table = dict[str, list[Row]]


class Recorder:
    """A pytest plugin that notes the audit records of each test."""

    def __init__(self, out: Path) -> None:
        self.out = out
        self.table: Table = {}
        self.rows: list[Row] = []

    def pytest_collection_finish(self, session: Any) -> None:
        """Watch every class with an audit, now that the tests have imported it."""
        found = {each for each in _classes() if "audit" in _fields(each)}
        if not found:
            raise RuntimeError("no class of stabmon has a dataclass field named audit")
        for each in found:
            _watch(each, self._note)

    def pytest_runtest_setup(self, item: Any) -> None:
        """Begin a test."""
        self.rows = self.table.setdefault(item.nodeid, [])

    def pytest_sessionfinish(self, session: Any) -> None:
        """Write the table, without tests that chose nothing."""
        told = {name: rows for name, rows in self.table.items() if rows}
        lines = (f"{json.dumps(name)}: {json.dumps(rows)}" for name, rows in sorted(told.items()))
        self.out.write_text("{\n" + ",\n".join(lines) + "\n}\n")

    def _note(self, record: Mapping[str, Any]) -> None:
        places = record.get("places") or [[record.get("layer"), record.get("head")]]
        settings = record.get("settings")
        row = [record.get("action"), record.get("intervention"), record.get("step")]
        self.rows.append(json.loads(json.dumps([*row, places, settings], default=repr)))


def _classes() -> list[type]:
    modules = [each for name, each in sys.modules.items() if name.partition(".")[0] == "stabmon"]
    return [each for module in modules for each in vars(module).values() if isinstance(each, type)]


def _fields(cls: type) -> set[str]:
    fields = dataclasses.fields(cls) if dataclasses.is_dataclass(cls) else ()
    return {each.name for each in fields}


def _watch(cls: type, note: Callable[[Mapping[str, Any]], None]) -> None:
    """Pass every record that a run of this class audits to ``note`` as well."""
    assign: Any = cls.__setattr__

    def watched(audit: Callable[..., Any]) -> Callable[..., Any]:
        def both(record: Mapping[str, Any], *args: Any, **kwargs: Any) -> Any:
            note(record)
            return audit(record, *args, **kwargs)

        return both

    def set_attribute(self: Any, name: str, value: Any) -> None:
        assign(self, name, watched(value) if name == "audit" else value)

    cls.__setattr__ = set_attribute  # type: ignore[method-assign, assignment]


def pytest_configure(config: Any) -> None:
    """Register the recorder where pytest was started by :func:`record`."""
    if OUT in os.environ:
        config.pluginmanager.register(Recorder(Path(os.environ[OUT])))


def record(out: Path, paths: list[str]) -> int:
    """Run tests with the recorder; return pytest's exit status."""
    paths_of_code = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {
        OUT: str(out.absolute()),
        "PYTHONPATH": os.pathsep.join(paths_of_code),
    }
    options = ["-p", "tests.bench.record_choices", "-p", "no:cacheprovider", "-q"]
    command = [sys.executable, "-m", "pytest", *options, *(paths or TESTS)]
    return subprocess.run(command, env=environment, cwd=ROOT).returncode


def compare(before: Table, after: Table) -> list[str]:
    """Describe each test whose choices differ or that has gone; tests that are new are fine."""
    by_function: dict[str, list[str]] = defaultdict(list)
    for name in after:
        by_function[name.rpartition("::")[2]].append(name)
    told = []
    for name, rows in before.items():
        named = [name] if name in after else by_function[name.rpartition("::")[2]]
        if not named:
            told.append(f"{name}: chooses nothing any more, or has gone")
        elif rows not in (candidates := [after[each] for each in named]):
            told.append(f"{name}:{_first_difference(rows, candidates[0])}")
    return told


def _first_difference(before: list[Row], after: list[Row]) -> str:
    pairs = zip(before, after, strict=False)
    end = min(len(before), len(after))
    at = next((i for i, (then, now) in enumerate(pairs) if then != now), end)
    then, now = (json.dumps(rows[at]) if at < len(rows) else "nothing" for rows in (before, after))
    return f" record {at + 1}\n  before {then}\n  after  {now}"


def main() -> None:
    """Record or compare."""
    parser = argparse.ArgumentParser(description="Record every choice of guard in the tests.")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"))
    parser.add_argument("out", nargs="?", type=Path, default=Path("choices.json"))
    parser.add_argument("paths", nargs="*", help=f"tests to run; {' and '.join(TESTS)} if left out")
    given = parser.parse_args()
    if given.compare is None:
        sys.exit(record(given.out, given.paths))
    before, after = (json.loads(path.read_text()) for path in given.compare)
    told = compare(before, after)
    print("\n".join([*told, f"{len(told)} of {len(before)} tests differ; {len(after)} choose now"]))
    sys.exit(bool(told))


if __name__ == "__main__":
    main()
