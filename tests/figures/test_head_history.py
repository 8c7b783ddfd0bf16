"""The picture of every head now and over the run: cells, scales, axes and marks."""

import numpy as np
import pytest
from matplotlib import colormaps

from stabmon.figures.head_history import MOST_COLUMNS, HeadHistory, Scale, head_history, pixels

VIRIDIS = (np.array(colormaps["viridis"].colors) * 255).round()
NAN = float("nan")


def signal(values: np.ndarray, steps: list[int] | None = None, **changes: object) -> HeadHistory:
    known = {"name": "Max logit", "unit": "score", "scale": Scale(0.0, 1.0)}
    return HeadHistory(
        steps=steps or list(range(1, len(values) + 1)), values=values, **(known | changes)
    )  # type: ignore[arg-type]


def cells(axes: object) -> np.ndarray:
    """The colours of an axes' cells, as places on the colour map; -1 for grey."""
    colours = np.asarray(axes.images[0].get_array())[..., :3].astype(float)  # type: ignore[attr-defined]
    distance = np.abs(colours[..., None, :] - VIRIDIS).sum(-1)
    return np.where(distance.min(-1) < 4, distance.argmin(-1), -1)


def test_the_matrix_is_the_newest_and_the_history_has_a_row_per_head() -> None:
    values = np.zeros((3, 2, 2))
    values[1, 1, 0], values[2, 0, 1] = 1.0, NAN
    matrix, history, *_ = head_history([signal(values)], ["h.0", "h.1"]).axes
    assert cells(matrix).tolist() == [[0, -1], [0, 0]]
    assert cells(history).tolist() == [[0, 0, 0], [0, 0, -1], [0, 255, 0], [0, 0, 0]]


def test_columns_are_even_in_steps_and_show_the_newest_measurement() -> None:
    values = np.array([0.0, 1.0, 0.0]).reshape(3, 1, 1)
    _, history, *_ = head_history([signal(values, [10, 12, 16])], ["h"]).axes
    assert cells(history).tolist() == [[0, 0, 255, 255, 255, 255, 0]]
    assert history.get_xlim() == (9.5, 16.5)
    _, history, *_ = head_history([signal(values[:1], [10])], ["h"]).axes
    assert cells(history).tolist() == [[0]]
    assert history.get_xlim() == (9.5, 10.5)
    long = np.zeros((1000, 1, 1))
    _, history, *_ = head_history([signal(long)], ["h"]).axes
    assert cells(history).shape == (1, MOST_COLUMNS)


def test_a_scale_is_linear_or_logarithmic_above_a_value_and_clips() -> None:
    values = np.array([[-5.0, 0.5, 2.0]])[None]
    matrix, *_ = head_history([signal(values, scale=Scale(0.0, 1.0))], ["h"]).axes
    assert cells(matrix).tolist() == [[0, 127, 255]]
    values = np.array([[0.0, 1.0, 10.0, 100.0, 1e4]])[None]
    figure = head_history([signal(values, scale=Scale(0.0, 100.0, log_above=1.0))], ["h"])
    assert cells(figure.axes[0]).tolist() == [[0, 84, 170, 255, 255]]
    bar = figure.axes[2]
    assert [each.get_text() for each in bar.get_yticklabels()] == ["0", "1", "10", "100"]
    assert bar.get_ylabel() == "score"


def test_axes_and_titles_name_signal_step_layers_and_marked_steps() -> None:
    values = np.zeros((5, 3, 4))
    marks = {"alarm": [3, 99], "intervention": [4]}
    names = [f"model.layers.{layer}.attn" for layer in range(3)]
    both = [
        signal(values, hint="grows", marks=marks),
        signal(values, name="Entropy", unit="nats"),
    ]
    figure = head_history(both, names)
    matrix, history, _, _, plain, _ = figure.axes
    texts = [each.get_text() for each in figure.texts]
    assert texts == [
        "Max logit of every head, step 5",
        "grows",
        "Entropy of every head, step 5",
        "",
    ]
    assert "model.layers.*.attn" in matrix.get_ylabel()
    assert [each.get_text() for each in matrix.get_yticklabels()] == ["0", "1", "2"]
    assert history.get_xlabel() == "optimizer step"
    assert {line.get_label(): list(line.get_xdata()) for line in history.lines} == {
        "alarm": [3],
        "intervention": [4],
    }
    assert not plain.lines
    assert plain.get_legend() is None


def test_pixels_are_twice_as_wide_as_high_and_leave_pyplot_alone() -> None:
    import sys

    before = {name for name in sys.modules if name.startswith("matplotlib.pyplot")}
    drawn = pixels(head_history([signal(np.zeros((1, 2, 3)))], ["a", "b"]))
    assert drawn.dtype == np.uint8
    assert drawn.shape == (480, 960, 3)
    assert {name for name in sys.modules if name.startswith("matplotlib.pyplot")} == before


def test_nothing_to_draw_is_said() -> None:
    with pytest.raises(ValueError, match="no signals to draw"):
        head_history([], ["h"])
    with pytest.raises(ValueError, match="no steps of 'Max logit' to draw"):
        head_history([signal(np.zeros((0, 1, 1)), [])], ["h"])
