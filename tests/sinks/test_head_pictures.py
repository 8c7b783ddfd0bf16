"""Pictures of every head: their signals, cadence and scales, and what is left without libraries."""

import logging
import subprocess
import sys

import numpy as np
import pytest

from stabmon.figures.head_history import MOST_COLUMNS, Scale
from stabmon.records import Reading
from stabmon.sinks.dashboards import head_pictures
from stabmon.sinks.dashboards.head_pictures import HeadPictures


def reading(step: int, **signals: float) -> Reading:
    return Reading(step, None, {"h": {name: np.full(2, value) for name, value in signals.items()}})


def test_one_picture_holds_entropy_and_largest_score_or_else_what_is_measured() -> None:
    pictures = HeadPictures(each_signal=False, every=1)
    (drawn,) = pictures.add(reading(1, attention_entropy=1.0, sink_mass=0.1, max_logit=3.0))
    assert drawn.name == "every_head"
    assert drawn.image.shape == (960, 960, 3)
    assert drawn.caption == (
        "step 1: attention_entropy 1 (dark) to 1 (bright); max_logit 3 (dark) to 3 (bright)"
    )
    (drawn,) = HeadPictures(each_signal=False, every=1).add(reading(1, sink_mass=0.1))
    assert drawn.image.shape == (480, 960, 3)
    assert HeadPictures(each_signal=False, every=1).add(Reading(1, None, {})) == []


def test_regular_pictures_wait_and_one_asked_for_comes_at_once_if_it_is_new(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    now = [0.0]
    monkeypatch.setattr(head_pictures.time, "monotonic", lambda: now[0])
    pictures = HeadPictures(each_signal=False, every=2)
    taken = []

    def draw(*arguments: object) -> np.ndarray:
        now[0] += 1.0
        return np.zeros((1, 1, 3), np.uint8)

    monkeypatch.setattr(head_pictures, "pixels", draw)
    for step in range(1, 300):
        taken += [step for _ in pictures.add(reading(step, max_logit=1.0))]
        now[0] += 1.0
    assert taken == [1, 101, 201]  # 1 s a picture, at most 1% of the time
    assert len(pictures.draw_if_due()) == 1
    assert pictures.draw_if_due() == pictures.draw() == []
    pictures.mark("alarm", 299)
    assert len(pictures.draw()) == 1
    each = HeadPictures(each_signal=True, every=2)
    taken = [step for step in range(1, 6) if each.add(reading(step, max_logit=1.0))]
    assert taken == [1, 3, 5]


def test_shares_and_scores_have_fixed_scales_and_others_only_widen(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    drawn: list[list[Scale]] = []
    real = head_pictures.head_history

    def spy(signals: list[head_pictures.HeadHistory], layers: list[str]) -> object:
        drawn.append([each.scale for each in signals])
        assert all(
            ("widens" in each.unit) == (each.name == "Attention entropy") for each in signals
        )
        return real(signals, layers)

    monkeypatch.setattr(head_pictures, "head_history", spy)
    pictures = HeadPictures(each_signal=True, every=1)
    for step, value in enumerate((1.2, 0.1, 7.0), start=1):
        pictures.add(
            reading(step, attention_entropy=value, max_logit=-value, normalized_entropy=value)
        )
    assert [scales[0] for scales in drawn[0::3]] == [
        Scale(0.0, 2.0),
        Scale(0.0, 2.0),
        Scale(0.0, 10.0),
    ]
    assert {scales[0] for scales in drawn[1::3]} == {Scale(0.0, 1000.0, log_above=1.0)}
    assert {scales[0] for scales in drawn[2::3]} == {Scale(0.0, 1.0)}


def test_a_long_run_is_thinned_and_keeps_its_beginning(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(head_pictures, "pixels", lambda figure: np.zeros((1, 1, 3), np.uint8))
    pictures = HeadPictures(each_signal=False, every=10**9)
    for step in range(1, 10 * MOST_COLUMNS):
        pictures.add(reading(step, max_logit=float(step)))
    history = pictures._history("max_logit", ["h"])
    assert MOST_COLUMNS <= len(history.steps) <= 2 * MOST_COLUMNS
    assert history.steps[0] == 1
    assert history.steps[-1] == 10 * MOST_COLUMNS - 1
    assert list(history.values[:, 0, 0]) == list(history.steps)


WITHOUT = """
import logging, sys
for name in {missing}:
    sys.modules[name] = None
logging.basicConfig(format="%(message)s")
import numpy as np
from stabmon.records import Reading
from stabmon.sinks.dashboards.head_pictures import HeadPictures
pictures = HeadPictures(each_signal=False, every=1)
for step in (1, 2):
    pictures.add(Reading(step, None, {{"h": {{"max_logit": np.ones(2)}}}}))
    pictures.mark("alarm", step)
    print([each.image.shape for each in pictures.draw()])
"""


@pytest.mark.parametrize(
    ("missing", "shapes", "words"),
    [
        (["matplotlib"], "[(24, 48, 3)]", "no axes and no history (matplotlib is missing"),
        (["PIL"], "[]", "there is none (pillow is missing"),
    ],
)
def test_without_a_library_there_is_less_and_that_is_said_once(
    missing: list[str], shapes: str, words: str
) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT.format(missing=missing)], capture_output=True, text=True
    )
    assert done.stdout.split("\n")[:2] == [shapes, shapes]
    assert done.stderr.count("stabmon cannot draw") == done.stderr.count(words) == 1


def test_a_drawing_that_fails_leaves_the_newest_matrix(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(*arguments: object) -> None:
        raise RuntimeError("no font")

    monkeypatch.setattr(head_pictures, "head_history", fail)
    pictures = HeadPictures(each_signal=True, every=1)
    with caplog.at_level(logging.WARNING):
        for step in (1, 2):
            (drawn,) = pictures.add(reading(step, max_logit=1.0))
            assert drawn.image.shape == (24, 48, 3)
    assert [record.message for record in caplog.records] == [
        "stabmon cannot draw its picture of every head as planned: it has no axes and no history "
        "(RuntimeError: no font)"
    ]
