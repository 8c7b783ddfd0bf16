"""Steps that the schedules sample: at the start, in a quiet run, while something moves, after a
resume, and within the budget.
"""

from __future__ import annotations

import json
import logging

import numpy as np
import pytest
import torch

from stabmon.engine.sampling import overhead
from stabmon.engine.sampling.schedule import AdaptiveSchedule, Plan, Schedule, make_schedule
from stabmon.records import NonFinite, Reading, StabilityIssue


def reading(step, score=20.0, entropy=0.6, **more):
    signals = {"max_logit": np.array([score, 3.0]), "normalized_entropy": np.array([entropy, 0.8])}
    return Reading(step, None, {"attn": signals}, **more)


def alarm(step):
    return StabilityIssue(step, "attn", 0, "logit_growth", "error", 9.0, 1.0, "clip", {})


def run(schedule, steps, make=reading, *, start=1, open_at=lambda step: False, watch=None):
    """Return the steps that are sampled, each read by ``make``."""
    sampled = []
    for step in range(start, start + steps):
        schedule.begin_step(step, 0.0)
        is_sampled = schedule.wants(step)
        if is_sampled:
            sampled.append(step)
            now = make(step)
            schedule.follow(step, schedule.plan(now))
            schedule.add(now)
            schedule.heed([alarm(step)] if open_at(step) else [], alone=True)
        schedule.end_step(step, 0.0, sampled=is_sampled)
        if watch is not None:
            schedule.watch(step, *watch(step))
    return sampled


@pytest.mark.parametrize("log_every", [1, 2, 7, 50, 1000])
def test_a_fixed_schedule_samples_every_nth_step_and_the_adaptive_one_these_and_more(log_every):
    fixed = run(Schedule(log_every), 400)
    assert fixed == list(range(log_every, 401, log_every))
    adaptive = run(AdaptiveSchedule(log_every, 1.0), 400)
    assert set(fixed) <= set(adaptive)
    assert adaptive[:8] == list(range(1, 9))
    assert 10 in adaptive  # at any interval four and more samples show the first ten steps


def test_a_quiet_run_comes_to_its_interval_and_stays_there():
    sampled = run(AdaptiveSchedule(50, 1.0), 1000)
    assert sampled[-15:] == list(range(300, 1001, 50))
    assert len(sampled) < 20 + 24


@pytest.mark.parametrize(
    ("name", "moves"),
    [
        ("score", lambda far: {"score": 20.0 * 1.06**far}),
        ("entropy", lambda far: {"entropy": 0.6 * 0.94**far}),
        ("rate", lambda far: {"learning_rates": {"0.0": 1e-3 * 1.1**far}}),
        ("gradient", lambda far: {"gradients": {"": 1.1**far, "attn": 0.1}}),
        ("update", lambda far: {"updates": {"0.0": 1e-3 * 1.1**far}}),
        ("loss", lambda far: {"losses": ((1, 2.0 + 0.01 * (far % 3) + 0.1 * far),)}),
    ],
)
def test_the_interval_shrinks_while_something_moves_and_relaxes_after_it(name, moves):
    schedule = AdaptiveSchedule(50, 1.0)
    sampled = run(schedule, 800, lambda step: reading(step, **moves(min(max(0, step - 400), 100))))
    before = [step for step in sampled if 300 <= step <= 400]
    during = [step for step in sampled if 400 < step <= 500]
    after = [step for step in sampled if 650 < step <= 800]
    assert np.diff(before).max() == 50
    assert len(during) >= 5
    assert after == [700, 750, 800]


def test_a_value_that_is_not_finite_brings_the_shortest_interval():
    found = NonFinite(400, "loss", None, None, "loss")
    schedule = AdaptiveSchedule(50, 1.0)
    sampled = run(
        schedule, 420, lambda step: reading(step, non_finite=found if step == 400 else None)
    )
    assert sampled[-2:] == [405, 415]


def test_an_open_alarm_keeps_the_shortest_interval():
    schedule = AdaptiveSchedule(50, 1.0)
    sampled = run(schedule, 500, open_at=lambda step: 300 <= step < 350)
    assert [step for step in sampled if 300 <= step <= 350] == list(range(300, 351, 5))
    assert sampled[-2:] == [450, 500]
    close = AdaptiveSchedule(3, 1.0)  # never longer than what was asked for
    assert run(close, 40, open_at=lambda step: step > 20)[-3:] == [33, 36, 39]


def test_a_loss_or_a_rate_that_leaps_between_samples_is_looked_at_in_the_next_step():
    losses = lambda step: 2.0 + 0.01 * (step % 3)  # noqa: E731

    def make(step):
        return reading(
            step,
            learning_rates={"0.0": 1e-3},
            losses=tuple((at, losses(at)) for at in range(step - 3, step + 1)),
        )

    for leap in ("loss", "loss on a device", "rate", "nothing"):
        schedule = AdaptiveSchedule(50, 1.0)

        def watch(step, leap=leap):
            loss = 4.0 if step == 413 and leap.startswith("loss") else losses(step)
            rate = 3e-3 if step == 413 and leap == "rate" else 1e-3
            # meta tensors cannot be read: a tensor stands for one on a device
            return torch.tensor(loss) if leap == "loss on a device" else loss, {"0.0": rate}

        sampled = run(schedule, 449, make, watch=watch)
        due = {"loss": [414], "loss on a device": [415], "rate": [414], "nothing": []}[leap]
        assert [step for step in sampled if step > 400][:1] == due


def test_ranks_take_the_soonest_wish_and_the_latest_limit():
    schedule = AdaptiveSchedule(50, 1.0)
    run(schedule, 400)
    wishes = [schedule.ahead(400, plan) for plan in (Plan(25, 1), Plan(5, 12))]
    assert wishes == [(25, 1), (5, 12)]
    schedule.agree(400, 400 + max(min(a for a, _ in wishes), max(b for _, b in wishes)))
    assert next(step for step in range(401, 450) if schedule.wants(step)) == 412


def test_a_limit_of_an_interval_and_more_ends_at_a_multiple_of_it():
    schedule = AdaptiveSchedule(50, 1.0)
    assert schedule.ahead(410, Plan(40, 60)) == (40, 90)


def test_a_fixed_schedule_keeps_to_its_multiples_whatever_ranks_wish():
    schedule = Schedule(10)
    assert schedule.first(23) == 30
    assert schedule.ahead(23, None) == (7, 1)


def test_without_a_common_plan_the_step_alone_decides():
    given = []
    for moved in (1.0, 3.0):  # what this rank saw does not count
        schedule = AdaptiveSchedule(50, 1.0)
        sampled = []
        for step in range(1, 300):
            schedule.begin_step(step, 0.0)
            if schedule.wants(step):
                sampled.append(step)
                now = reading(step, 20.0 * moved ** (step / 20))
                schedule.plan(now)
                schedule.follow(step, None)
                schedule.add(now)
        given.append(sampled)
    assert given[0] == given[1]
    assert given[0][-2:] == [200, 250]


def test_a_step_without_a_reading_does_not_stop_the_schedule():
    schedule = AdaptiveSchedule(50, 1.0)
    sampled = []
    for step in range(1, 201):
        schedule.begin_step(step, 0.0)
        is_sampled = schedule.wants(step)
        sampled += [step] * is_sampled
        schedule.end_step(step, 0.0, sampled=is_sampled)
    assert sampled[-2:] == [187, 200]
    assert len(sampled) < 30


def test_a_resumed_schedule_goes_on_where_it_was_and_ranks_begin_with_a_sample():
    def make(step):
        return reading(step, 20.0 * 1.05 ** max(0, step - 280), losses=((step, 2.0),))

    whole = AdaptiveSchedule(50, 1.0)
    expected = run(whole, 400, make)
    first = AdaptiveSchedule(50, 1.0)
    done = run(first, 290, make)
    state = json.loads(json.dumps(first.state_dict()))
    second = AdaptiveSchedule(50, 1.0)
    second.parse_state(state)()
    history = [make(step) for step in done]
    second.resume(history, [(step, 2.0) for step in done], alone=True)
    assert done + run(second, 110, make, start=291) == expected
    rank = AdaptiveSchedule(50, 1.0)
    rank.parse_state(state)()
    rank.resume(history, [], alone=False)
    assert rank.wants(291)


@pytest.mark.parametrize("state", [None, {}])
def test_a_state_without_a_schedule_is_one_of_an_earlier_version(state):
    schedule = AdaptiveSchedule(50, 1.0)
    schedule.parse_state(state)()
    assert run(schedule, 12, start=1001) == [*range(1001, 1009), 1010, 1012]


def test_a_state_that_is_none_is_refused():
    with pytest.raises(ValueError, match="next"):
        AdaptiveSchedule(50, 1.0).parse_state({"first": 1, "last": 2, "next": "soon"})


def test_a_run_that_goes_back_is_sampled_from_there():
    schedule = AdaptiveSchedule(50, 1.0)
    run(schedule, 400)
    assert run(schedule, 60, start=301)[0] == 301


def test_a_configuration_names_its_schedule():
    assert not make_schedule("fixed", 50, 0.01).adapts
    made = make_schedule("adaptive", 50, 0.02)
    assert isinstance(made, AdaptiveSchedule)
    assert made.budget.share == 0.02


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


def spend(schedule, clock, steps, *, step_takes, sample_takes, open_at=lambda step: False):
    """Return the sampled steps of a run on its own clock, and the share that they took."""
    schedule.budget._clock = clock
    sampled, spent = [], 0.0
    for step in range(1, steps + 1):
        schedule.begin_step(step, spent)
        clock.now += step_takes
        is_sampled = schedule.wants(step)
        if is_sampled:
            sampled.append(step)
            clock.now += sample_takes
            spent += sample_takes
            schedule.follow(step, schedule.plan(reading(step)))
            schedule.heed([alarm(step)] if open_at(step) else [], alone=True)
        schedule.end_step(step, spent, sampled=is_sampled)
    return sampled, spent / clock.now


def test_samples_are_put_off_where_they_take_more_than_their_share(monkeypatch, caplog):
    monkeypatch.setattr(overhead, "FREE_SAMPLES", 0)
    for takes in (0.1, 1.0, 30.0):
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            sampled, share = spend(
                AdaptiveSchedule(50, 0.01), Clock(), 20_000, step_takes=1.0, sample_takes=takes
            )
        assert share <= 0.0101 + 30 / 20_000  # the first sample comes before its cost is known
        steps = np.array(sampled[len(sampled) // 2 :])
        assert (steps % 50 == 0).all()  # put off to later multiples
        assert np.diff(steps)[-1] == {0.1: 50, 1.0: 100, 30.0: 3000}[takes]
        said = [each.getMessage() for each in caplog.records]
        assert len(said) == (takes > 0.1)
        assert all("max_overhead=0.01" in each and "schedule='fixed'" in each for each in said)


def test_the_first_samples_are_free_and_an_alarm_uses_what_quiet_steps_have_saved():
    short, _ = spend(AdaptiveSchedule(5, 0.01), Clock(), 400, step_takes=1.0, sample_takes=1.2)
    assert len(short) >= 80  # a run as short as this is sampled as if there were no limit
    sampled, share = spend(
        AdaptiveSchedule(50, 0.01),
        Clock(),
        20_000,
        step_takes=1.0,
        sample_takes=0.1,
        open_at=lambda step: step >= 10_000,
    )
    at_once = [step for step in sampled if 10_000 <= step < 10_500]
    assert np.diff(at_once).max() == 5
    assert share <= 0.01 + overhead.FREE_SAMPLES * 0.1 / 20_000


def test_what_every_step_takes_is_not_counted():
    budget = overhead.OverheadBudget(0.01, clock=Clock())
    seconds = 0.0
    for step in range(300):
        budget.begin_step(seconds)
        seconds += 0.5 + 0.1 * (step % 2)
        budget.end_step(seconds, sampled=step % 2 == 1)
    assert budget.cost == pytest.approx(0.1)
    assert budget.spent == pytest.approx((150 - overhead.FREE_SAMPLES) * 0.1)


def test_without_a_limit_nothing_is_put_off():
    sampled, _ = spend(AdaptiveSchedule(1, 1.0), Clock(), 500, step_takes=1.0, sample_takes=99.0)
    assert sampled == list(range(1, 501))
