"""What heatmaps show, read off their own artists."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from stabmon.figures.canvas import saved
from stabmon.figures.heatmaps import head_grid, layer_grid, single_map
from stabmon.figures.labels import drawable, plain_token, ticks
from stabmon.figures.pooling import block_max, block_max_by
from stabmon.figures.tables import letter_map, similarity_matrix, table_map

RANDOM = np.random.default_rng(0)


def maps(layers: int = 3, heads: int = 2, side: int = 5) -> list[np.ndarray]:
    found = RANDOM.random((layers, heads, side, side))
    return list(found / found.sum(-1, keepdims=True))


def panels(figure):
    return [axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"]


def title(figure) -> str:
    return figure.get_suptitle()


def test_a_grid_holds_every_head_unchanged_on_one_scale() -> None:
    given = maps()
    figure = head_grid(given, ["0", "1", "2"])
    drawn = panels(figure)
    assert len(drawn) == 6
    for axes, (layer, head) in zip(drawn, np.ndindex(3, 2), strict=True):
        assert np.array_equal(axes.images[0].get_array(), given[layer][head])
        assert axes.images[0].get_clim() == (0.0, max(each.max() for each in given))
        assert axes.get_title() == f"head {head}"
    assert [axes.get_ylabel() for axes in drawn[::2]] == ["layer 0", "layer 1", "layer 2"]
    assert "attention probability" in figure.axes[-1].get_ylabel()


def test_heads_keep_their_own_numbers_and_layers_may_have_fewer() -> None:
    given = [maps()[0], maps()[0][:1]]
    figure = head_grid(given, ["a", "b"], heads=[[3, 7], [5]], scale="unit")
    assert [axes.get_title() for axes in panels(figure)] == ["head 3", "head 7", "head 5"]
    assert panels(figure)[0].images[0].get_clim() == (0.0, 1.0)


def test_panels_on_their_own_scales_say_so() -> None:
    figure = head_grid(maps(), ["0", "1", "2"], scale="own")
    assert "own scale" in title(figure)
    limits = {axes.images[0].get_clim()[1] for axes in panels(figure)}
    assert len(limits) == 6


def test_a_model_with_many_layers_is_thinned_out_and_the_title_says_so() -> None:
    figure = head_grid(maps(layers=40, heads=1, side=3), [str(n) for n in range(40)])
    assert len(panels(figure)) <= 16
    assert "of 40 layers" in title(figure)


def test_pooling_is_said_on_the_picture() -> None:
    assert "4 × 4 pairs" in title(head_grid(maps(), ["0", "1", "2"], pooled=4))
    assert "4 × 4 pairs" in title(single_map(maps()[0][0], pooled=4))
    assert "4 × 4 pairs" in title(
        layer_grid([each[0] for each in maps()], ["0", "1", "2"], pooled=4)
    )
    assert "pairs" not in title(single_map(maps()[0][0]))


def test_every_cell_of_512_gets_a_pixel_in_the_saved_grid(tmp_path: Path) -> None:
    """Single bright cells, which nearest-neighbour scaling to a small panel would lose."""
    given = np.zeros((1, 1, 512, 512), dtype=np.float32)
    cells = [(3, 7), (100, 501), (257, 256), (511, 0)]
    for row, column in cells:
        given[0, 0, row, column] = 1.0
    figure = head_grid([given[0]], ["0"])
    saved(figure, tmp_path / "grid.png")
    with Image.open(tmp_path / "grid.png") as read:
        picture = np.asarray(read.convert("RGB")).astype(int)
    box = panels(figure)[0].get_window_extent()
    assert min(box.width, box.height) >= 512
    yellow = (picture[..., 0] > 200) & (picture[..., 1] > 190) & (picture[..., 2] < 120)
    scale = picture.shape[1] / figure.bbox.width
    for row, column in cells:
        x = int((box.x0 + (column + 0.5) / 512 * box.width) * scale)
        y = int(picture.shape[0] - (box.y1 - (row + 0.5) / 512 * box.height) * scale)
        assert yellow[y - 2 : y + 3, x - 2 : x + 3].any(), (row, column)


def test_what_is_too_large_for_exact_cells_is_pooled_and_says_so() -> None:
    given = list(np.zeros((1, 16, 600, 600), dtype=np.float32))
    figure = head_grid(given, ["0"])
    assert panels(figure)[0].images[0].get_array().shape == (300, 300)
    assert "2 × 2 pairs" in title(figure)


def test_one_map_has_tokens_on_its_axes_and_hostile_ones_are_drawn_as_text(tmp_path: Path) -> None:
    tokens = [" the", "$x^2$", "a\nb", "😀", "שלום"]
    figure = single_map(maps()[0][0], queries=tokens, keys=tokens, path=tmp_path / "map.png")
    axes = panels(figure)[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        "␣the",
        "$x^2$",
        "a↵b",
        "😀",
        "שלום",
    ]
    assert (axes.get_ylabel(), axes.get_xlabel()) == ("query token", "key token")
    assert (tmp_path / "map.png").stat().st_size > 5000


def test_a_long_map_has_positions_on_its_axes_in_the_unit_of_the_unpooled_one() -> None:
    axes = panels(single_map(np.eye(100), queries=["t"] * 100, pooled=8))[0]
    labels = [label.get_text() for label in axes.get_xticklabels()]
    assert axes.get_ylabel() == "query position"
    assert labels[:2] == ["0", "56"]


def test_nan_is_grey_and_does_not_spoil_the_scale() -> None:
    given = maps()
    given[1][0][2] = np.nan
    axes = panels(head_grid(given, ["0", "1", "2"]))[2]
    assert np.ma.is_masked(axes.images[0].get_array()[2])
    assert np.isfinite(axes.images[0].get_clim()).all()
    assert axes.get_facecolor()[:3] == pytest.approx((0.72, 0.72, 0.72))


def test_a_map_of_nothing_but_nan_is_drawn() -> None:
    single_map(np.full((3, 3), np.nan))


def test_a_table_has_a_number_a_cell_and_a_fixed_scale_for_shares() -> None:
    figure = table_map(
        np.array([[0.25, 1.0], [0.5, np.nan]]), ["a", "b"], unit="share", title="t", limits=(0, 1)
    )
    axes = panels(figure)[0]
    assert [text.get_text() for text in axes.texts] == ["0.25", "1", "0.5"]
    assert axes.images[0].get_clim() == (0, 1)
    assert figure.axes[-1].get_ylabel() == "share"


def test_letters_stand_in_the_cells_and_are_explained() -> None:
    figure = letter_map(
        [["S", "P"], ["SP"]], ["0", "1"], {"S": "sink", "P": "previous", "U": "uniform"}, title="t"
    )
    texts = [text.get_text() for text in figure.axes[0].texts]
    assert texts[:3] == ["S", "P", "SP"]
    assert texts[3] == "S  sink\nP  previous"


def test_similarity_is_on_a_scale_from_zero_to_one() -> None:
    figure = similarity_matrix(np.array([[1.0, 0.25], [0.25, 1.0]]), ["0", "1"])
    assert panels(figure)[0].images[0].get_clim() == (0, 1)
    with pytest.raises(ValueError, match="give \\[L, L\\]"):
        similarity_matrix(np.eye(3), ["0", "1"])


def test_wrong_calls_are_refused() -> None:
    with pytest.raises(ValueError, match="no maps"):
        head_grid([], [])
    with pytest.raises(ValueError, match="3 maps and 1 names"):
        head_grid(maps(), ["0"])
    with pytest.raises(ValueError, match="scale 'x'"):
        layer_grid([np.eye(2)], ["0"], scale="x")


def test_blocks_are_pooled_by_their_maximum_with_nan_left_out() -> None:
    matrix = RANDOM.random((2, 7, 9))
    pooled, factor = block_max(matrix, 3)
    assert (pooled.shape, factor) == ((2, 3, 3), 3)
    for row, column in np.ndindex(3, 3):
        block = matrix[:, 3 * row : 3 * row + 3, 3 * column : 3 * column + 3]
        assert np.array_equal(pooled[:, row, column], block.max((1, 2)))
    matrix[0, :3, :3] = np.nan
    matrix[0, 0, 3] = np.nan
    again = block_max_by(matrix, 3)
    assert np.isnan(again[0, 0, 0])
    assert np.isfinite(again[0, 0, 1])
    assert block_max(matrix, 9)[1] == 1


def test_labels_are_one_line_and_bounded() -> None:
    assert plain_token("\x00a\u202e") == "·a·"
    assert plain_token("") == "∅"
    assert plain_token("\ud800") == "·"
    assert drawable("日") == "□"
    assert ticks(0) == []


def test_drawing_leaves_pyplot_alone() -> None:
    import sys

    single_map(np.eye(2))
    if "matplotlib.pyplot" in sys.modules:
        assert not sys.modules["matplotlib.pyplot"].get_fignums()
