"""Check that guard still makes every choice that version 1 made in these tests.

The table was made by ``python tests/bench/record_choices.py``; a choice that is changed on purpose
is recorded anew, and the commit says why.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parents[1]
RECORDER = TESTS / "bench" / "record_choices.py"
TABLE = TESTS / "states" / "choices_1.json"


@pytest.mark.long
def test_guard_chooses_as_before(tmp_path: Path) -> None:
    names = ("test_guard.py", "test_guarding.py")
    files = [str(path) for name in names for path in TESTS.rglob(name)]
    after = tmp_path / "after.json"
    run(str(after), *files)
    run("--compare", str(TABLE), str(after))


def test_a_changed_choice_and_a_missing_test_are_told(tmp_path: Path) -> None:
    stored = dict(list(json.loads(TABLE.read_text()).items())[:2])
    (first, rows), (second, _) = stored.items()
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    before.write_text(json.dumps(stored))
    after.write_text(json.dumps({f"elsewhere.py::{first.rpartition('::')[2]}": rows[:-1]}))
    with pytest.raises(AssertionError) as failed:
        run("--compare", str(before), str(after))
    assert f"{first}: record {len(rows)}" in str(failed.value)
    assert f"{second}: chooses nothing any more" in str(failed.value)
    assert "2 of 2 tests differ" in str(failed.value)


def run(*arguments: str) -> None:
    command = [sys.executable, str(RECORDER), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
