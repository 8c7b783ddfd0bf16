"""A run under guard that is killed and resumed leaves the records of an uninterrupted one."""

from __future__ import annotations

import pytest

from tests.bench.kill_resume import Cycle, Result, cycles, is_right, row_of, run_through

pytestmark = pytest.mark.long


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> tuple[Result, list[Cycle]]:
    """The uninterrupted run, and two that were killed: one with its state, one without."""
    folder = tmp_path_factory.mktemp("killed")
    whole = folder / "whole"
    whole.mkdir()
    return run_through("loop", whole), list(cycles(["loop"], 2, 0, folder))


def test_the_uninterrupted_run_has_alarms_and_interventions(
    found: tuple[Result, list[Cycle]],
) -> None:
    reference, _ = found
    assert {line.split()[3] for line in reference.issues} >= {"update_spike", "non_finite"}
    applied = {line.split()[2] for line in reference.audit if " applied " in line}
    assert applied >= {"cap_learning_rate", "cap_query_key_norm", "rollback"}


def test_nothing_is_lost_doubled_or_decided_otherwise(found: tuple[Result, list[Cycle]]) -> None:
    reference, killed = found
    assert [each.damage for each in killed] == ["whole", "cut off"]
    for each in killed:
        assert each.resumed_from, "it was killed after a checkpoint"
        assert is_right(each.damage, row_of([each], reference)), row_of([each], reference)


def test_what_is_lost_would_be_seen(found: tuple[Result, list[Cycle]]) -> None:
    reference, killed = found
    lacking = Cycle("loop", "whole", 5, 3, True, Result(), False)
    assert not is_right("whole", row_of([lacking], reference))
    assert not is_right("cut off", row_of([killed[0]], reference)), "it had to say so"
