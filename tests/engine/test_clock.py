"""Check the order of listeners, what one that raises does to others, and the phases."""

import pytest

from stabmon.engine.clock import Phase, StepClock
from stabmon.engine.error_boundary import ErrorBoundary
from stabmon.listeners import StepContext, StepListener

MOMENTS = {
    "on_step_begin": (StepContext(1, True),),
    "on_attention": ("call",),
    "on_forward_end": (None, "output"),
    "on_forward_error": (),
    "on_backward_end": (),
    "before_optimizer_step": (StepContext(1, True),),
    "on_step_end": (StepContext(1, True),),
}
ALONE = {"before_optimizer_step", "on_step_end"}
"""Moments at which stabmon works while training waits."""


class Spy(StepListener):
    """Notes each moment with the clock's phase; raises at one of them."""

    def __init__(self, name: str, seen: list, raises: str = "") -> None:
        self.name, self.seen, self.raises = name, seen, raises
        self.clock: StepClock | None = None

    def note(self, moment: str, *arguments: object) -> None:
        assert self.clock is not None
        self.seen.append((self.name, moment, arguments, self.clock.phase))
        if moment == self.raises:
            raise RuntimeError(moment)


def _noting(moment: str):
    return lambda self, *arguments: self.note(moment, *arguments)


for _moment in (*MOMENTS, "close"):
    setattr(Spy, _moment, _noting(_moment))


def make(*raises: str) -> tuple[StepClock, list]:
    """Return a clock in training with one listener for each entry, named 0, 1, ..."""
    seen: list = []
    spies = [Spy(str(number), seen, each) for number, each in enumerate(raises)]
    clock = StepClock(ErrorBoundary(), spies)
    clock.phase = Phase.TRAINING
    for spy in spies:
        spy.clock = clock
    return clock, seen


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_moment_reaches_every_listener_in_order_with_what_is_known(moment: str) -> None:
    clock, seen = make("", "", "")
    getattr(clock, moment)(*MOMENTS[moment])
    phase = Phase.OWN_WORK if moment in ALONE else Phase.TRAINING
    assert seen == [(name, moment, MOMENTS[moment], phase) for name in "012"]
    assert clock.phase is Phase.TRAINING


@pytest.mark.parametrize("moment", [*MOMENTS, "close"])
def test_a_listener_that_raises_stops_no_other_and_is_counted(moment: str) -> None:
    clock, seen = make("", moment, "")
    getattr(clock, moment)(*MOMENTS.get(moment, ()))
    # what has raised as it was closed is closed again
    times = 2 if moment == "close" else 1
    assert sorted(name for name, *_ in seen) == ["0", *["1"] * times, "2"]
    assert clock.boundary.errors == {f"Spy.{moment}": times}
    assert clock.phase is (Phase.CLOSED if moment == "close" else Phase.TRAINING)


def test_listeners_are_closed_in_reverse_order_in_the_closed_phase() -> None:
    clock, seen = make("", "", "")
    clock.close()
    assert seen == [(name, "close", (), Phase.CLOSED) for name in "210"]


def test_own_work_is_not_recorded_and_the_phase_before_comes_back() -> None:
    clock, _ = make()
    assert clock.is_recording
    with clock.own_work():
        assert not clock.is_recording
        with clock.own_work():
            pass
        assert not clock.is_recording
    assert clock.phase is Phase.TRAINING
    with pytest.raises(ZeroDivisionError), clock.own_work():
        raise ZeroDivisionError
    assert clock.phase is Phase.TRAINING


def test_news_of_a_step_is_gone_when_the_next_begins() -> None:
    clock, _ = make("", "")
    assert not clock.has_news
    clock.listeners[1].has_news = True
    assert clock.has_news
    clock.reset_news()
    assert not clock.has_news
    assert not clock.listeners[1].has_news


@pytest.mark.parametrize("wish", ["wants_attention", "wants_backward_end"])
def test_one_listener_that_wants_something_is_enough(wish: str) -> None:
    wanting = type("Wanting", (StepListener,), {wish: True})
    assert not getattr(StepClock(ErrorBoundary(), [StepListener()]), wish)
    assert getattr(StepClock(ErrorBoundary(), [StepListener(), wanting()]), wish)


def test_time_in_listeners_is_overhead() -> None:
    clock, _ = make("on_backward_end")
    clock.on_backward_end()
    assert clock.boundary.seconds > 0
