"""Weights laid over tokens and images: as pictures, as HTML, in the terminal, as a surface."""

import builtins
import html.parser
import io
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

from stabmon.figures.images import image_figure, image_html, png_of
from stabmon.figures.surface import attention_surface
from stabmon.figures.texts import text_figure, text_html, text_terminal

TOKENS = ["The", " <b>cat</b>", "\n", "“$x$”", " 😀", "שלום", "&amp;", "\x1b[31m"]
WEIGHTS = np.array([0.4, 0.2, 0.0, 0.1, 0.05, 0.05, 0.2, np.nan])


class Seen(html.parser.HTMLParser):
    """Tags, titles and text of a fragment."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.titles: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.titles += [value or "" for name, value in attrs if name == "title"]

    def handle_data(self, data: str) -> None:
        self.text += data


def test_the_picture_has_a_box_a_token_shaded_by_weight(tmp_path: Path) -> None:
    figure = text_figure(TOKENS, WEIGHTS, marked=1, path=tmp_path / "text.png")
    axes = figure.axes[0]
    assert [text.get_text() for text in axes.texts][:3] == ["The", "␣<b>cat</b>", "↵"]
    light = [sum(box.get_facecolor()[:3]) for box in axes.patches]
    assert light[0] < light[1] < light[2]
    assert axes.patches[-1].get_facecolor()[:3] == pytest.approx((0.72, 0.72, 0.72))
    assert [box.get_linewidth() > 1 for box in axes.patches] == [False, True] + [False] * 6
    with Image.open(tmp_path / "text.png") as read:
        assert read.size[0] > 1000


def test_a_long_text_is_drawn_where_it_weighs_most(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("stabmon.figures.texts.MOST_TOKENS", 60)
    weights = np.zeros(1000)
    weights[900] = 1.0
    figure = text_figure(["x"] * 1000, weights)
    assert len(figure.axes[0].patches) == 60
    assert "of 1000" in figure.get_suptitle()


def test_html_has_every_number_on_hover_and_in_a_table_and_escapes_tokens() -> None:
    text = text_html(TOKENS, WEIGHTS, marked=0)
    seen = Seen(text)
    assert "b" not in seen.tags
    assert seen.titles == [f"{at}: {weight:.4g} share" for at, weight in enumerate(WEIGHTS)]
    assert "<b>cat</b>" in seen.text
    assert seen.tags.count("tr") == 1 + len(TOKENS)
    assert "script" not in seen.tags
    assert "\x1b" not in text
    assert seen.tags.count("bdi") == 2 * len(TOKENS)


def test_the_table_holds_the_largest_first() -> None:
    rows = re.findall(
        r"<tr><td>(\d+)</td>", text_html(["a", "b", "c"], np.array([0.1, 0.7, 0.2]), most=2)
    )
    assert rows == ["1", "2"]


def test_the_terminal_shows_weights_without_colour_and_no_control_characters() -> None:
    file = io.StringIO()
    Console(file=file, width=200, no_color=True).print(text_terminal(TOKENS, WEIGHTS, marked=1))
    shown = file.getvalue()
    assert shown.startswith("The₉[ <b>cat</b>]₅↵")
    assert "\x1b" not in shown
    assert shown.rstrip().endswith("·[31m?")


def test_terminal_colours_are_the_terminals_own() -> None:
    file = io.StringIO()
    Console(file=file, width=200, force_terminal=True, color_system="truecolor").print(
        text_terminal(["a"], np.array([1.0]))
    )
    assert not re.search(r"[34]8;[25];", file.getvalue())


def test_an_image_stands_beside_its_patches() -> None:
    picture = np.zeros((8, 16, 3), dtype=np.uint8)
    picture[..., 0] = 255
    grid = np.array([[0.0, 1.0]])
    figure = image_figure(picture, grid)
    plain, over, alone = (
        axes for axes in figure.axes if axes.images and axes.get_label() != "<colorbar>"
    )
    assert np.array_equal(plain.images[0].get_array()[..., 0], np.ones((8, 16)))
    shown = over.images[0].get_array()[..., 0]
    assert shown[:, 8:].min() == 1.0
    assert shown[:, :8].max() < 0.2
    assert np.array_equal(alone.images[0].get_array(), grid)
    assert "1 × 2 patches" in alone.get_title()


def test_an_images_html_holds_the_image_and_every_patch() -> None:
    picture = np.random.default_rng(0).random((6, 6, 3))
    text = image_html(picture, np.array([[0.1, 0.2], [0.3, np.nan]]))
    seen = Seen(text)
    assert seen.titles[2] == "row 1, column 0: 0.3 share"
    assert seen.tags.count("i") == 4
    assert 'src="data:image/png;base64,' in text
    with Image.open(io.BytesIO(png_of(picture))) as read:
        assert np.abs(np.asarray(read) / 255 - picture).max() < 0.003


def test_what_does_not_fit_is_refused() -> None:
    with pytest.raises(ValueError, match="2 tokens"):
        text_html(["a", "b"], np.zeros(3))
    with pytest.raises(ValueError, match=r"give \[height, width, 3\]"):
        image_html(np.zeros((2, 2, 5)), np.zeros((1, 1)))


def test_a_surface_is_pooled_to_128_and_says_so() -> None:
    pytest.importorskip("plotly")
    matrix = np.tril(np.random.default_rng(0).random((300, 300)))
    figure = attention_surface(matrix)
    height = np.asarray(figure.data[0].z)
    assert height.shape == (100, 100)
    assert height.max() == matrix.max()
    assert "3 × 3 pairs" in figure.layout.title.text
    assert list(figure.data[0].x[:2]) == [0, 3]
    with pytest.raises(ValueError, match=r"saved as \.html"):
        attention_surface(matrix, path="surface.png")


def test_a_missing_library_is_named_with_its_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    real = builtins.__import__

    def missing(name: str, *args, **kwargs):
        if name.startswith("plotly"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r'pip install "stabmon\[plotly\]"'):
        attention_surface(np.eye(2))
