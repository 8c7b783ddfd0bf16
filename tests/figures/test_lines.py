"""What lines, distributions and the figures of caches show, read off their own artists."""

from pathlib import Path

import numpy as np
import pytest

from stabmon.figures.caches import (
    budget_bars,
    layer_preferences,
    loss_against_size,
    preservation_bars,
)
from stabmon.figures.distributions import distributions, over_layers
from stabmon.figures.kept_keys import decode_pattern, kept_positions
from stabmon.figures.lines import over_time, positions_over_time, query_row, received_attention

RANDOM = np.random.default_rng(0)


def test_a_querys_row_is_bars_over_its_tokens() -> None:
    figure = query_row({"row": np.array([0.5, 0.25, 0.25])}, tokens=["a", "b", "$c"], title="Row")
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [0.5, 0.25, 0.25]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["a", "b", "$c"]
    assert axes.get_ylabel() == "attention probability"
    assert axes.get_ylim()[0] == 0


def test_lines_differ_in_dash_and_marker_not_in_colour_alone() -> None:
    figure = query_row({f"head {n}": RANDOM.random(20) for n in range(8)})
    lines = figure.axes[0].lines
    looks = {(str(line.get_linestyle()), line.get_marker()) for line in lines}
    markers = {line.get_marker() for line in lines}
    assert len(lines) == len(looks) == len(markers) == 8


def test_more_lines_than_can_be_told_apart_are_said_to_be_left_out() -> None:
    figure = query_row({str(n): RANDOM.random(5) for n in range(12)})
    assert len(figure.axes[0].lines) == 8
    assert "8 of 12" in figure.get_suptitle()


def test_many_layers_received_attention_becomes_a_heatmap() -> None:
    received = RANDOM.random((24, 30))
    figure = received_attention(received, [str(n) for n in range(24)])
    assert np.array_equal(figure.axes[0].images[0].get_array(), received)
    few = received_attention(received[:3], ["0", "1", "2"])
    assert [
        np.array_equal(line.get_ydata(), row)
        for line, row in zip(few.axes[0].lines, received, strict=False)
    ] == [True] * 3


def test_a_statistic_over_layers_shows_heads_and_their_mean() -> None:
    values = np.array([[1.0, 3.0], [2.0, np.nan], [np.nan, np.nan]])
    figure = over_layers(values, ["0", "1", "2"], unit="nats", title="Entropy")
    axes = figure.axes[0]
    assert np.array_equal(axes.lines[0].get_ydata(), [2.0, 2.0, np.nan], equal_nan=True)
    assert axes.collections[0].get_offsets().shape == (6, 2)
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("nats", "layer")


def test_evolution_over_checkpoints_and_over_generation_steps() -> None:
    figure = over_time(
        [0, 50, 200],
        {"layer 0": np.array([0.1, 0.5, 0.9])},
        unit="share",
        title="Sink",
        limits=(0, 1),
    )
    assert figure.axes[0].lines[0].get_xdata().tolist() == [0, 50, 200]
    assert figure.axes[0].get_ylim() == (0, 1)
    many = over_time([0, 1], {str(n): np.zeros(2) for n in range(10)}, unit="share", title="t")
    assert many.axes[0].images[0].get_array().shape == (10, 2)
    grown = np.array([[1.0, np.nan], [0.5, 0.5]])
    evolved = positions_over_time(grown, unit="share", title="t")
    assert "grey" in evolved.axes[0].get_xlabel()
    assert np.ma.is_masked(evolved.axes[0].images[0].get_array()[0, 1])


def test_distributions_have_a_box_a_group_and_leave_out_nan() -> None:
    figure = distributions(
        {"a": np.array([1.0, 2.0, np.nan]), "b": np.arange(3)}, unit="nats", title="t"
    )
    axes = figure.axes[0]
    medians = [line.get_ydata()[0] for line in axes.lines if line.get_linewidth() == 2]
    assert medians == [1.5, 1.0]
    assert "2 to 3 values" in figure.get_suptitle()


def test_budgets_stand_beside_the_full_cache() -> None:
    figure = budget_bars(
        {"filled": np.array([3, 5]), "published": np.array([4, 4])}, ["0", "1"], full=16
    )
    axes = figure.axes[0]
    assert [bar.get_height() for bar in axes.patches] == [3, 5, 4, 4]
    assert axes.lines[0].get_ydata()[0] == 16
    assert len({bar.get_hatch() for bar in axes.patches}) == 2


def test_preferences_have_a_panel_each_and_sum_to_one() -> None:
    figure = layer_preferences(
        np.array([1.0, 2.0]), np.array([0.1, 0.2]), np.array([1.0, 3.0]), ["0", "1"]
    )
    assert [axes.get_title() for axes in figure.axes] == ["dispersion D", "shift V", "preference P"]
    assert [bar.get_height() for bar in figure.axes[2].patches] == [0.25, 0.75]


def test_kept_positions_mark_the_window_and_what_is_not_compressed() -> None:
    share = np.array([[1.0, 0.5, 0.0, 1.0], [np.nan] * 4])
    figure = kept_positions(share, ["0", "1"], window=1)
    image = figure.axes[0].images[0]
    assert np.array_equal(image.get_array()[0], share[0])
    assert image.get_clim() == (0, 1)
    assert {line.get_xdata()[0] for line in figure.axes[0].lines} == {2.5}
    assert "last 1 positions" in figure.get_suptitle()
    assert "not compressed" in figure.get_suptitle()


def test_a_decode_pattern_has_a_panel_a_layer_of_steps_and_positions() -> None:
    share = RANDOM.random((3, 4, 9))
    figure = decode_pattern(share, ["0", "1", "2"])
    drawn = [axes.images[0].get_array() for axes in figure.axes if axes.images]
    assert [np.array_equal(a, b) for a, b in zip(drawn, share, strict=True)] == [True] * 3


def test_perplexity_against_size_shows_median_and_spread(tmp_path: Path) -> None:
    values = np.array([[4.0, 5.0, 6.0, 7.0, 8.0], [2.0, 3.0, 4.0, 5.0, 6.0]])
    figure = loss_against_size(
        [32, 64], {"cake": values, "recency": values + 1}, full=2.5, path=tmp_path / "p.svg"
    )
    axes = figure.axes[0]
    assert axes.lines[0].get_ydata().tolist() == [6.0, 4.0]
    bars = axes.collections[0].get_segments()
    assert [segment[:, 1].tolist() for segment in bars] == [[5.0, 7.0], [3.0, 5.0]]
    assert "5 prompts" in figure.get_suptitle()
    assert [label.get_text() for label in axes.get_xticklabels()] == ["32", "64"]
    assert (tmp_path / "p.svg").read_text().startswith("<?xml")


def test_preservation_is_on_a_scale_of_shares() -> None:
    figure = preservation_bars(
        {"cake": np.array([0.5, 0.6]), "best": np.array([0.7, 0.8])}, ["0", "1"]
    )
    assert figure.axes[0].get_ylim() == (0, 1)


@pytest.mark.parametrize("draw", [budget_bars, preservation_bars])
def test_nothing_to_draw_is_refused(draw) -> None:
    with pytest.raises(ValueError, match="no bars"):
        draw({}, [])
