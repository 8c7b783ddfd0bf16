"""A call that hangs holds up its caller once, for a bounded time."""

import threading
import time

import pytest

from stabmon.sinks.delivery.slow_start import SlowStart


def test_a_value_is_returned_and_the_call_is_made_once() -> None:
    made: list[str] = []
    start = SlowStart("x", lambda: made.append(threading.current_thread().name) or 7)
    assert [start.result(), start.result()] == [7, 7]
    assert made == ["stabmon x"]


def test_one_that_hangs_is_waited_for_once_and_found_later() -> None:
    release = threading.Event()
    start = SlowStart("wandb.init", lambda: release.wait(20) and "run", patience=0.2)
    began = time.monotonic()
    with pytest.raises(TimeoutError, match=r"wandb.init has not returned within 0.2 s"):
        start.result()
    assert 0.2 <= time.monotonic() - began < 5
    began = time.monotonic()
    for _ in range(3):
        with pytest.raises(TimeoutError):
            start.result()
    assert time.monotonic() - began < 0.15
    release.set()
    until = time.monotonic() + 10
    found = None
    while found is None and time.monotonic() < until:
        try:
            found = start.result()
        except TimeoutError:
            time.sleep(0.01)
    assert found == "run"


def test_what_it_raises_is_raised_and_the_next_call_tries_again() -> None:
    answers = iter([OSError("no network"), 5])

    def make() -> int:
        answer = next(answers)
        if isinstance(answer, Exception):
            raise answer
        return answer

    start = SlowStart("x", make)
    with pytest.raises(OSError, match="no network"):
        start.result()
    assert start.result() == 5


def test_a_value_that_comes_after_the_end_is_given_away() -> None:
    release, late = threading.Event(), threading.Event()
    start = SlowStart("x", lambda: release.wait(20), patience=0.01)
    with pytest.raises(TimeoutError):
        start.result()
    start.abandon(lambda value: late.set())
    release.set()
    assert late.wait(10)
