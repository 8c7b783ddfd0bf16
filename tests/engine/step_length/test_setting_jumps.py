"""A rate is judged against its own past and by how far its step moves the group."""

import pytest

from stabmon.engine.step_length.setting_jumps import TRAINED, RateJumps


def trained(rates, steps=TRAINED):
    jumps = RateJumps()
    for _ in range(steps):
        assert not jumps.find(rates)
        assert not jumps.add(rates, {})
    return jumps


def test_a_group_without_a_past_has_not_jumped():
    assert not trained({"0.0": 1.0}, steps=TRAINED - 1).find({"0.0": 100.0})
    assert not trained({"0.0": 0.0}).find({"0.0": 100.0})


@pytest.mark.parametrize(("update", "accepted"), [(0.01, True), (0.2, False)])
def test_a_jump_is_accepted_where_its_step_is_short(update, accepted):
    jumps = trained({"0.0": 1.0})
    assert jumps.find({"0.0": 10.0}) == {"0.0": 1.0}
    assert jumps.add({"0.0": 10.0}, {"0.0": update}) == ({} if accepted else {"0.0": 1.0})
    assert not jumps.find({"0.0": 10.0}), "it is told once"
    assert bool(jumps.find({"0.0": 50.0})) == accepted, "against 10, or open still"


def test_it_is_told_again_after_it_came_down():
    jumps = trained({"0.0": 1.0})
    for rate, found in ((10.0, {"0.0": 1.0}), (10.0, {}), (2.0, {}), (9.0, {"0.0": 2.0})):
        assert jumps.add({"0.0": rate}, {"0.0": 0.2}) == found


def test_a_step_that_was_not_made_leaves_the_answer_open():
    jumps = trained({"0.0": 1.0})
    assert not jumps.add({"0.0": 10.0}, {"0.0": 0.0})
    assert jumps.find({"0.0": 10.0}) == {"0.0": 1.0}
    assert jumps.add({"0.0": 10.0}, {"0.0": 0.2}) == {"0.0": 1.0}


def test_groups_that_jump_alike_are_judged_by_their_median():
    rates = {"0.0": 1.0, "0.1": 1.0, "0.2": 1.0}
    up = dict.fromkeys(rates, 10.0)
    jumps = trained(rates)
    assert not jumps.add(up, {"0.0": 0.001, "0.1": 0.002, "0.2": 0.9})
    jumps = trained(rates)
    assert set(jumps.add(up, {"0.0": 0.001, "0.1": 0.1, "0.2": 0.9})) == set(rates)
    jumps = trained(rates)
    assert jumps.add(up | {"0.2": 1000.0}, {"0.0": 0.001, "0.1": 0.002, "0.2": 0.9}) == {"0.2": 1.0}


def test_it_goes_on_from_its_state():
    jumps = trained({"0.0": 1.0})
    fresh = RateJumps()
    fresh.parse_state(jumps.state_dict())()
    assert fresh.find({"0.0": 10.0}) == {"0.0": 1.0}
    fresh.parse_state(None)()
    assert fresh.find({"0.0": 10.0}) == {"0.0": 1.0}
    with pytest.raises(ValueError, match="highest"):
        fresh.parse_state({"highest": {"0.0": "much"}, "steps": {}})


def test_a_group_that_jumps_alone_is_judged_beside_the_others():
    jumps = trained({"0.0": 1.0, "0.1": 1.0})
    assert not jumps.add({"0.0": 1.0, "0.1": 10.0}, {"0.1": 0.02}, others=0.01)
    jumps = trained({"0.0": 1.0, "0.1": 1.0})
    assert jumps.add({"0.0": 1.0, "0.1": 10.0}, {"0.1": 0.02}, others=0.001) == {"0.1": 1.0}
