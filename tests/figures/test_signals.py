"""What the figures show, read off their own artists; and that drawing leaves no trace elsewhere."""

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabmon.diagnosis import Diagnosis
from stabmon.figures.labels import short_names
from stabmon.figures.signals import signal_evolution, signal_heatmap
from stabmon.records import Reading
from stabmon.signals.presentation import presentation_of

NAN, INF = float("nan"), float("inf")
NAMES = ("model.layers.0.self_attn", "model.layers.1.self_attn")


def readings(layers: int = 2, steps: int = 3) -> tuple[Reading, ...]:
    """Layer n, head h at reading t holds 10 n + h + t / 10, as a share of entropy a thousandth of
    that.
    """
    grid = [[10.0 * n + np.arange(3) + t / 10 for n in range(layers)] for t in range(steps)]
    return tuple(
        Reading(
            100 * (t + 1),
            2.0,
            {
                f"model.layers.{n}.self_attn": {
                    "max_logit": v,
                    "hnf_log_curvature": v,
                    "normalized_entropy": v / 1000,
                }
                for n, v in enumerate(r)
            },
        )
        for t, r in enumerate(grid)
    )


def heatmap(stats: Any, signal: str, step: int, path: Path | None = None) -> Any:
    """:func:`signal_heatmap` as the signal is presented."""
    shown = presentation_of(signal)
    return signal_heatmap(stats, signal, step, path, unit=shown.unit, limits=shown.limits)


def evolution(found: Sequence[Reading], signal: str, path: Path | None = None) -> Any:
    """:func:`signal_evolution` of readings, as the signal is presented."""
    shown = presentation_of(signal)
    return signal_evolution(
        [each.step for each in found],
        [each.layers for each in found],
        signal,
        path,
        unit=shown.unit,
        reduction=shown.reduction,
    )


def test_a_heatmap_shows_every_head_under_a_title_a_scale_and_short_names(tmp_path: Path) -> None:
    reading = readings()[0]
    figure = heatmap(reading.layers, "max_logit", 100, tmp_path / "heads.png")
    axes, bar = figure.axes
    assert np.array_equal(axes.images[0].get_array(), [[0, 1, 2], [10, 11, 12]])
    assert axes.get_title() == "Max logit of every head at step 100"
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1"]
    assert axes.get_ylabel() == "layer\nmodel.layers.*.self_attn"
    assert bar.get_ylabel() == "score"
    assert (tmp_path / "heads.png").read_bytes().startswith(b"\x89PNG")


def test_shares_have_a_fixed_scale_and_other_signals_their_own() -> None:
    reading = readings()[0]
    assert heatmap(reading.layers, "normalized_entropy", 1).axes[0].images[0].get_clim() == (0, 1)
    assert heatmap(reading.layers, "max_logit", 1).axes[0].images[0].get_clim() == (0, 12)


def test_heads_without_a_finite_value_are_masked_and_layers_may_differ_in_width() -> None:
    stats = {
        "a": {"max_logit": np.array([1.0, NAN, INF])},
        "b": {"max_logit": np.array([2.0])},
        "c": {"other": np.array([1.0])},
    }
    shown = heatmap(stats, "max_logit", 1).axes[0].images[0].get_array()
    assert isinstance(shown, np.ma.MaskedArray)
    assert shown.mask.tolist() == [[False, True, True], [False, True, True]]


def test_the_largest_head_is_drawn_of_a_maximum_and_the_mean_of_the_rest(tmp_path: Path) -> None:
    figure = evolution(readings(), "max_logit", tmp_path / "steps.svg")
    axes = figure.axes[0]
    drawn = [line.get_xydata().tolist() for line in axes.lines]
    assert drawn == [[[100, 2.0], [200, 2.1], [300, 2.2]], [[100, 12.0], [200, 12.1], [300, 12.2]]]
    assert axes.get_title() == "Max logit of every layer, step 100 to 300"
    assert axes.get_ylabel() == "largest head (score)"
    assert axes.get_xlabel() == "optimizer step"
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0", "1"]
    assert (tmp_path / "steps.svg").stat().st_size > 0
    mean = evolution(readings(), "normalized_entropy").axes[0]
    assert mean.lines[0].get_ydata().tolist() == pytest.approx([0.001, 0.0011, 0.0012])
    assert mean.get_ylabel().startswith("mean over heads")


def test_many_layers_get_a_colour_bar_instead_of_a_legend() -> None:
    figure = evolution(readings(layers=20), "max_logit")
    axes, bar = figure.axes
    assert axes.get_legend() is None
    assert len(axes.lines) == 20
    assert bar.get_ylabel() == "model.layers.*.self_attn"


def test_a_head_that_stops_being_finite_is_marked_and_one_that_never_was_is_not() -> None:
    rows = [[1.0, NAN, 2.0], [1.0, NAN, INF], [1.0, NAN, INF], [NAN, NAN, NAN]]
    found = [
        Reading(step, 1.0, {"a": {"max_logit": np.array(row)}}) for step, row in enumerate(rows, 1)
    ]
    line, *marks = sorted(
        evolution(found, "max_logit").axes[0].lines, key=lambda line: line.get_linestyle()
    )
    assert [mark.get_xdata()[0] for mark in marks] == [2, 4]
    assert np.array_equal(line.get_ydata(), [2.0, 1.0, 1.0, NAN], equal_nan=True)


def test_small_maps_and_few_lines_are_read_without_colour() -> None:
    stats = {"a": {"max_logit": np.array([1.25, NAN, 3.0])}, "b": {"max_logit": np.array([2.0])}}
    axes = heatmap(stats, "max_logit", 1).axes[0]
    assert [(text.get_position(), text.get_text()) for text in axes.texts] == [
        ((0, 0), "1.2"),
        ((2, 0), "3"),
        ((0, 1), "2"),
    ]
    assert [(patch.get_xy(), patch.get_hatch()) for patch in axes.patches] == [((0.5, -0.5), "xxx")]
    wide = {"a": {"max_logit": np.array([1.0, NAN] * 20)}}
    crowded = heatmap(wide, "max_logit", 1).axes[0]
    assert (len(crowded.texts), len(crowded.patches)) == (0, 20)
    lines = evolution(readings(layers=8), "max_logit").axes[0].lines
    assert len({(str(line.get_linestyle()), line.get_marker()) for line in lines}) == 8
    ends = evolution(readings(layers=20), "max_logit").axes[0].texts
    assert {text.get_text().strip() for text in ends} == {"0", "19"}


def test_a_layer_that_comes_late_has_a_gap() -> None:
    first, second = readings()[:2]
    late = Reading(first.step, 1.0, {NAMES[0]: first.layers[NAMES[0]]})
    lines = evolution([late, second], "max_logit").axes[0].lines
    assert np.isnan(lines[1].get_ydata()[0])


def test_what_cannot_be_drawn_says_why() -> None:
    reading = readings()[0]
    with pytest.raises(
        ValueError,
        match=r"no layer has the signal 'max_logits'. Measured: hnf_log_curvature, max_logit",
    ):
        heatmap(reading.layers, "max_logits", 1)
    with pytest.raises(ValueError, match="no attention was measured"):
        heatmap({}, "max_logit", 1)
    with pytest.raises(ValueError, match="sample at least one step first"):
        evolution([], "max_logit")
    with pytest.raises(ValueError, match="no layer has the signal"):
        evolution([reading], "max_logits")
    with pytest.raises(ValueError, match="no attention was measured"):
        evolution([Reading(1, 1.0, {})], "max_logit")


def test_a_diagnosis_draws_its_two_figures(tmp_path: Path) -> None:
    all_readings = readings()
    diagnosis = Diagnosis(300, (), all_readings[-1].layers, all_readings)
    assert (
        "Normalized entropy"
        in diagnosis.plot_entropy_heatmap(tmp_path / "a.png").axes[0].get_title()
    )
    assert "HNF log curvature" in diagnosis.plot_curvature_evolution().axes[0].get_title()
    assert (tmp_path / "a.png").exists()


def test_layers_are_named_by_what_tells_them_apart() -> None:
    assert short_names(["h.0.attn", "h.10.attn"]) == (["0", "10"], "h.*.attn")
    assert short_names(["a.attn", "a.attn#1"]) == (["attn", "attn#1"], "a.*")
    assert short_names(["x", "x.x"]) == (["·", "x"], "x.*")
    assert short_names([]) == ([], "")


def test_drawing_touches_neither_pyplot_nor_the_backend() -> None:
    code = """
import sys, numpy as np
import stabmon.figures.signals
assert "matplotlib" not in sys.modules
stabmon.figures.signals.signal_heatmap({"a": {"max_logit": np.ones(2)}}, "max_logit", 1, unit="score")
print("matplotlib.pyplot" in sys.modules)
sys.modules["matplotlib.figure"] = None
try:
    stabmon.figures.signals.signal_heatmap({"a": {"max_logit": np.ones(2)}}, "max_logit", 1, unit="score")
except ImportError as error:
    print(error)
"""
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert found.stdout.splitlines() == [
        "False",
        'matplotlib is not installed: pip install "stabmon[report]"',
    ]
