"""Weights that were multiplied are told with their part; what steps can do is not."""

import math

import pytest

from stabmon.records import PartChange, Reading
from stabmon.rules.weight_jump import WeightJump
from tests.support.trajectories import run


def course(ratio, update=0.01, every=5, count=12, known=True):
    """Readings of two parts; the first is ``ratio`` times as large at the ninth."""
    found = []
    for i in range(count):
        before = 4.0 if known else math.nan
        embed = PartChange(4.0 * (ratio if i == 8 else 1.0), before, update)
        parts = {"embed": embed, "head": PartChange(2.0, 2.0, 0.01)}
        found.append(Reading((i + 1) * every, 2.0, {}, parts=parts))
    return found


@pytest.mark.parametrize(
    ("ratio", "severity"), [(1000.0, "error"), (2.5, "error"), (0.1, "warning")]
)
def test_a_part_that_was_multiplied_is_named(ratio, severity):
    opened, *rest = run(course(ratio), [WeightJump()])
    assert (opened.step, opened.layer, opened.head) == (45, "embed", None)
    assert (opened.severity, opened.value) == (severity, pytest.approx(ratio))
    assert "embed" in opened.suggestion
    assert [each.state for each in rest] == ["closed"]


@pytest.mark.parametrize(
    "readings",
    [
        course(1.5),
        course(3.0, every=100),  # a hundred steps of 1% may do that
        course(3.0, update=0.2),
        course(1000.0, known=False),
        course(0.0),
        course(math.inf),
        course(math.nan),
        course(1000.0, update=math.nan),
        course(1000.0)[7:],  # too early to know what a step does
    ],
)
def test_what_steps_can_do_and_what_is_not_known_give_nothing(readings):
    assert not run(readings, [WeightJump()])
