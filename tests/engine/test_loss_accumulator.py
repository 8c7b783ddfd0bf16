"""Check how a step's loss is put together from what the loop reports and the model returns."""

import math

import pytest
import torch

from stabmon.engine.loss_accumulator import LossAccumulator


def tensor(value: float) -> torch.Tensor:
    return torch.tensor(value, requires_grad=True)


def taken(losses: LossAccumulator) -> list[tuple[int, float]]:
    return [(step, pytest.approx(loss)) for step, loss in losses.drain()]


@pytest.mark.parametrize(("shares", "expected"), [(False, 2.0), (True, 4.0)])
def test_found_losses_are_averaged_unless_they_are_shares(shares: bool, expected: float) -> None:
    losses = LossAccumulator(keep=10)
    losses.add_from_output({"loss": tensor(1.0)})
    losses.add_from_output({"loss": tensor(3.0)})
    assert losses.end_step(1, None, shares) == expected


def test_told_losses_are_added_up_and_put_found_ones_aside() -> None:
    losses = LossAccumulator(keep=10)
    losses.add_from_output({"loss": tensor(100.0)})
    losses.add_reported(tensor(1.0))
    losses.add_from_output({"loss": tensor(100.0)})
    losses.add_reported(tensor(2.0))
    assert losses.end_step(1, None, shares=False) == 3.0


def test_the_loops_own_loss_counts_before_all_others() -> None:
    losses = LossAccumulator(keep=10)
    losses.add_reported(tensor(1.0))
    assert losses.end_step(1, 0.5, shares=True) == 0.5
    assert losses.end_step(2, torch.tensor([7.0]), shares=True) == 7.0


def test_nothing_of_a_step_remains_in_the_next() -> None:
    losses = LossAccumulator(keep=10)
    losses.add_reported(tensor(1.0))
    losses.end_step(1, None, shares=False)
    losses.add_from_output({"loss": tensor(4.0)})  # found ones count again
    assert losses.end_step(2, None, shares=False) == 4.0
    losses.add_reported(tensor(9.0))
    losses.start_step()
    assert losses.end_step(3, None, shares=False) is None
    assert losses.drain() == ((1, 1.0), (2, 4.0))


def test_no_graph_is_kept() -> None:
    losses = LossAccumulator(keep=10)
    losses.add_reported(tensor(1.0))
    losses.add_from_output({"loss": tensor(1.0)})
    assert not any(part.requires_grad for part in losses.parts)


def test_half_precision_parts_are_added_in_single() -> None:
    losses = LossAccumulator(keep=10)
    for _ in range(3):
        losses.add_reported(torch.tensor(60000.0, dtype=torch.float16))
    assert losses.end_step(1, None, shares=False) == 180000.0


def test_a_loss_of_several_numbers_is_refused_with_the_mend_and_leaves_no_part() -> None:
    losses = LossAccumulator(keep=10)
    losses.add_reported(tensor(1.0))
    with pytest.raises(ValueError, match=r"shape \[2, 3\].*loss\.mean\(\)"):
        losses.end_step(1, torch.ones(2, 3), shares=False)
    assert losses.end_step(2, None, shares=False) is None
    assert losses.drain() == ()


def test_losses_are_taken_once_and_the_oldest_fall_out() -> None:
    losses = LossAccumulator(keep=3)
    for step in range(1, 6):
        losses.end_step(step, float(step), shares=False)
    assert losses.drain() == ((3, 3.0), (4, 4.0), (5, 5.0))
    assert losses.drain() == ()
    losses.end_step(6, math.nan, shares=False)
    ((step, loss),) = losses.drain()
    assert step == 6
    assert math.isnan(loss)


def test_losses_that_no_reading_had_come_back_from_a_state() -> None:
    losses, other = LossAccumulator(keep=3), LossAccumulator(keep=2)
    for step in (1, 2, 3):
        losses.end_step(step, float(step), shares=False)
    state = losses.state_dict()
    take_up = other.parse_state(state)
    assert other.drain() == ()  # nothing is changed before it is taken up
    take_up()
    assert other.drain() == ((2, 2.0), (3, 3.0))
    assert losses.drain() == ((1, 1.0), (2, 2.0), (3, 3.0))


@pytest.mark.parametrize("state", [[[1]], [["one", 1.0]], [[1, "two"]], {"1": 1.0}])
def test_what_is_no_state_is_refused(state: object) -> None:
    with pytest.raises(ValueError):
        LossAccumulator(keep=3).parse_state(state)
