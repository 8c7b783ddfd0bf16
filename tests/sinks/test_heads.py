"""The picture of all heads, and the table of recent issues."""

import numpy as np

from stabmon.records import Reading
from stabmon.sinks.head_images import colour_range, head_image, head_matrix, signal_names
from stabmon.sinks.issue_table import COLUMNS, RecentIssues
from tests.support.sample_records import issue

NAN = float("nan")


def test_layers_of_different_width_are_padded_with_nan() -> None:
    reading = Reading(
        1,
        None,
        {
            "a": {"x": np.array([1.0, 2.0, 3.0])},
            "b": {"x": np.array([4.0])},
            "c": {"y": np.array([5.0])},
        },
    )
    matrix = head_matrix(reading, "x")
    assert np.array_equal(
        matrix, np.array([[1, 2, 3], [4, NAN, NAN], [NAN, NAN, NAN]]), equal_nan=True
    )
    assert signal_names(reading) == ["x", "y"]
    assert head_matrix(Reading(1, None, {}), "x").shape == (0, 0)


def test_colours_run_from_dark_to_bright_and_grey_is_not_a_number() -> None:
    image = head_image(np.array([[0.0, 1.0, 0.5], [NAN, np.inf, -2.0]]), 0.0, 1.0)
    side = image.shape[0] // 2
    assert image.shape == (2 * side, 3 * side, 3)
    assert image.dtype == np.uint8
    cell = image[::side, ::side]
    assert cell[0, 0].tolist() == [0x44, 0x01, 0x54]
    assert cell[0, 1].tolist() == [0xFD, 0xE7, 0x25]
    assert cell[1, 0].tolist() == cell[1, 1].tolist() == [160, 160, 160]
    assert cell[1, 2].tolist() == cell[0, 0].tolist()
    assert cell[0, 0].sum() < cell[0, 2].sum() < cell[0, 1].sum()


def test_a_scale_is_fixed_where_steps_should_compare_and_fitted_elsewhere() -> None:
    matrix = np.array([[0.2, NAN, np.inf, 0.4]])
    assert colour_range("normalized_entropy", matrix) == (0.0, 1.0)
    assert colour_range("max_logit", matrix) == (0.2, 0.4)
    assert colour_range("max_logit", np.array([[NAN]])) == (0.0, 1.0)
    assert head_image(np.full((1, 1), 3.0), 3.0, 3.0).shape[2] == 3


def test_issues_are_bounded_and_published_at_intervals_and_at_the_end() -> None:
    recent = RecentIssues(seconds=1e9, keep=3)
    assert not recent.due(last_call=True)
    for head in range(5):
        recent.add(issue(1, head=head))
    assert recent.due()
    rows = recent.publish()
    assert [row[COLUMNS.index("head")] for row in rows] == [2, 3, 4]
    recent.add(issue(2))
    assert not recent.due()
    assert recent.due(last_call=True)
