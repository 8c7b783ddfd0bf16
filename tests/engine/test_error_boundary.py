"""Check that the error boundary counts, logs once, skips, and counts each second once."""

import logging
import time

import pytest

from stabmon.engine.error_boundary import ErrorBoundary, contained


class Part:
    """Something with a boundary."""

    def __init__(self) -> None:
        self.boundary = ErrorBoundary()

    @contained
    def double(self, number: int) -> int:
        if number < 0:
            raise ValueError(f"no {number}")
        return 2 * number

    @contained
    def _hidden(self) -> None:
        raise OSError("disk full")

    @contained
    def interrupt(self) -> None:
        raise KeyboardInterrupt


def test_a_method_that_works_returns_its_value_and_counts_nothing() -> None:
    part = Part()
    assert part.double(3) == 6
    assert not part.boundary.errors


def test_a_method_that_fails_is_skipped_counted_by_its_name_and_logged_once(caplog) -> None:
    part = Part()
    with caplog.at_level(logging.ERROR, logger="stabmon"):
        assert [part.double(-1), part.double(-2), part._hidden()] == [None, None, None]
    assert part.boundary.errors == {"double": 2, "hidden": 1}
    told = [record.getMessage() for record in caplog.records]
    assert told == [
        "stabmon: double failed and is skipped, training goes on: no -1",
        "stabmon: hidden failed and is skipped, training goes on: disk full",
    ]
    assert all(record.exc_info is not None for record in caplog.records)


def test_a_failure_is_logged_without_a_traceback_where_that_is_asked(caplog) -> None:
    ErrorBoundary().failed("there", ValueError("known"), traceback=False)
    assert [record.exc_info for record in caplog.records] == [None]


def test_an_interrupt_passes_through_and_its_time_is_counted_to_an_end() -> None:
    part = Part()
    with pytest.raises(KeyboardInterrupt):
        part.interrupt()
    assert not part.boundary.errors
    before = part.boundary.seconds
    assert before > 0
    with part.boundary.timed():
        time.sleep(0.01)
    assert part.boundary.seconds >= before + 0.01  # the interrupted block is not still open


def test_seconds_of_nested_blocks_are_counted_once() -> None:
    boundary = ErrorBoundary()
    started = time.perf_counter()
    with boundary.timed(), boundary.timed():
        time.sleep(0.02)
        with boundary.timed():
            time.sleep(0.02)
        assert boundary.seconds == 0  # counted when the outermost block ends
    assert 0.04 <= boundary.seconds <= time.perf_counter() - started


def test_the_overhead_is_the_share_since_it_was_last_asked() -> None:
    boundary = ErrorBoundary()
    boundary.overhead_fraction()
    with boundary.timed():
        time.sleep(0.02)
    time.sleep(0.02)
    assert 0 < boundary.overhead_fraction() < 1
    time.sleep(0.001)
    assert boundary.overhead_fraction() == 0
