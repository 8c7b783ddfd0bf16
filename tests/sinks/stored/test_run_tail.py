"""A run followed while it is written, against all its records read."""

import shutil
import time
from pathlib import Path

from stabmon.sinks.reader import read_records
from stabmon.sinks.stored.run_tail import RunTail
from tests.support.written_records import collapse, opened, store, wide_reading


def test_a_run_is_followed_from_before_its_folder_is_made(tmp_path: Path) -> None:
    folder = tmp_path / "run" / "stabmon"
    tail = RunTail(folder)
    state = tail.look()
    assert (state.run, state.reading) == (0, None)
    assert str(folder) in state.trouble
    sink = opened(folder)
    state = tail.look()
    assert (state.run, state.reading, state.trouble) == (1, None, "")
    assert state.meta["sampling"] == {"first": 10}
    sink.write_reading(wide_reading(10), {})
    sink.write_issue(collapse(10))
    sink.write_issue(collapse(10, head=2))
    sink.write_intervention({"intervention": "stop", "action": "applied", "step": 10})
    state = tail.look()
    assert state.reading is not None
    assert state.last_line is not None
    assert abs(time.time() - state.last_line) < 60
    assert [each.key for each in state.open_issues] == [
        ("entropy_collapse", "h.0.attn", 1),
        ("entropy_collapse", "h.0.attn", 2),
    ]
    assert [(each.number, each.heads) for each in state.open_incidents] == [(1, 2)]
    assert len(state.interventions) == 1
    sink.write_issue(collapse(20, state="closed", severity="info"))
    sink.write_issue(collapse(20, head=2, state="closed", severity="info"))
    state = tail.look()
    assert (state.open_issues, state.open_incidents) == ((), ())
    assert [each.state for each in state.incidents] == ["closed"]
    sink.close()


def test_what_a_later_start_wins_over_goes(tmp_path: Path) -> None:
    sink, tail = store(tmp_path, range(10, 60, 10)), RunTail(tmp_path)
    for step in (10, 30, 50):
        sink.write_issue(collapse(step, head=step // 10))
        sink.write_intervention({"action": "applied", "step": step})
    sink.close()
    assert len(tail.look().issues) == 3
    sink = opened(tmp_path, continues=True)
    sink.write_reading(wide_reading(30), {})
    sink.write_issue(collapse(40, head=3))
    sink.close()
    state, records = tail.look(), read_records(tmp_path)
    assert tuple(state.issues) == records.issues
    assert tuple(state.interventions) == records.interventions
    assert {(each.number, each.heads) for each in state.incidents} == {
        (each.number, each.heads) for each in records.incidents
    }


def test_a_run_that_begins_anew_in_the_folder_is_the_one_shown(tmp_path: Path) -> None:
    sink, tail = store(tmp_path, (10, 20)), RunTail(tmp_path)
    sink.write_issue(collapse(20))
    sink.close()
    assert tail.look().run == 1
    sink = opened(tmp_path)
    state = tail.look()
    assert (state.run, state.reading, state.issues, state.last_line) == (2, None, (), None)
    assert len(state.earlier_issues) == 1
    sink.write_reading(wide_reading(10), {})
    sink.close()
    state = tail.look()
    assert state.reading is not None
    assert [point.step for point in state.points] == [10]


def test_a_disk_that_is_away_for_a_while_is_said_and_awaited(tmp_path: Path) -> None:
    folder, away = tmp_path / "run", tmp_path / "away"
    sink, tail = store(folder, (10, 20)), RunTail(folder)
    sink.write_issue(collapse(20))
    before = tail.look()
    folder.rename(away)
    state = tail.look()
    assert str(folder) in state.trouble
    assert (state.reading, state.issues) == (before.reading, before.issues)
    sink.write_reading(wide_reading(30), {})  # the run goes on writing to the same files
    away.rename(folder)
    state = tail.look()
    assert (state.trouble, len(state.points), len(state.issues)) == ("", 3, 1)
    sink.close()


def test_a_folder_that_was_deleted_and_made_anew_holds_the_new_run_alone(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    sink, tail = store(folder, (10, 20, 30)), RunTail(folder)
    sink.write_issue(collapse(20))
    sink.close()
    tail.look()
    shutil.rmtree(folder)
    store(folder, (5,)).close()
    state = tail.look()
    assert [point.step for point in state.points] == [5]
    assert (state.issues, state.earlier_issues, state.incidents) == ((), (), ())


def test_the_framework_of_the_run_words_the_advice(tmp_path: Path) -> None:
    sink = store(tmp_path, (10,))
    sink.amend({"framework": "transformers"})
    sink.write_issue(collapse(10))
    sink.close()
    found = RunTail(tmp_path).look().incidents[0]
    assert found == read_records(tmp_path).incidents[0]


def test_unreadable_lines_cost_themselves_alone(tmp_path: Path) -> None:
    sink = store(tmp_path, (10,))
    sink.write_issue(collapse(10))
    sink.close()
    with (tmp_path / "issues.jsonl").open("ab") as file:
        file.write(b'{"schema_version": 1, "step": "x"}\n[]\n{"schema_version": 7}\n{"half')
    (tmp_path / "meta.json").write_text("{broken")
    state = RunTail(tmp_path).look()
    assert (len(state.issues), state.trouble, state.run) == (1, "", 1)
