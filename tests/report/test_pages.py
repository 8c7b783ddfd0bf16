"""Pages of every kind: what they say, and what a real browser makes of them."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from stabmon.analysis.record import AnalysisRecord
from stabmon.report.kinds import page_of
from stabmon.report.page import encoded, for_page, render
from tests.support import analysis_records as records
from tests.support.browser_pages import alone, opened


def text_of(record: AnalysisRecord) -> str:
    """The page with its pictures left out, which the browser does not need."""
    page = page_of(record)
    return render(page, {picture.name: ("image/png", b"") for picture in page.pictures})


def test_a_page_of_each_kind_asks_for_nothing_and_complains_of_nothing(
    browser: Any, tmp_path: Path
) -> None:
    for record in (
        records.heatmap(),
        records.rollout(),
        records.images(),
        records.cake(),
        records.evolution(),
    ):
        found = opened(browser, text_of(record), tmp_path)
        assert alone(found), (record.kind, found.requests, found.errors)
        assert found.page.locator("#verdict p").first.inner_text()
        found.page.close()


def test_hostile_tokens_are_text_and_nothing_else(browser: Any, tmp_path: Path) -> None:
    found = opened(browser, text_of(records.rollout()), tmp_path)
    assert found.page.locator(".tokens script").count() == 0
    assert "<script>alert(1)</script>" in found.page.locator(".tokens").first.inner_text()
    assert found.page.locator(".tokens span").first.get_attribute("title") == "0: 0.2 share"
    assert alone(found)


def test_words_and_tables_can_be_read_with_javascript_off(browser: Any, tmp_path: Path) -> None:
    found = opened(browser, text_of(records.heatmap()), tmp_path, java_script_enabled=False)
    assert "4 heads in 2 layers" in found.page.locator("#verdict").inner_text()
    assert "needs JavaScript" in found.page.locator("#map").inner_text()
    assert found.page.locator("table").count() >= 1


def test_the_selectors_keys_and_fields_change_what_the_map_shows(
    browser: Any, tmp_path: Path
) -> None:
    record = records.heatmap()
    found = opened(browser, text_of(record), tmp_path)
    page, readout = found.page, found.page.locator("#readout")

    def value(layer: int, head: int, query: int, key: int) -> str:
        return f"{record.arrays[f'maps/{records.LAYERS[layer]}'][head, query, key]:.3g}"

    def shown() -> float:
        return float(readout.inner_text().rpartition(": ")[2])

    assert page.locator("#layer").input_value() == "1"
    assert shown() == pytest.approx(float(value(1, 0, 9, 0)), rel=0.01)
    before = page.evaluate("document.getElementById('canvas').toDataURL()")
    page.select_option("#layer", "0")
    assert shown() == pytest.approx(float(value(0, 0, 9, 0)), rel=0.01)
    assert page.evaluate("document.getElementById('canvas').toDataURL()") != before
    page.select_option("#head", "1")
    assert shown() == pytest.approx(float(value(0, 1, 9, 0)), rel=0.01)
    page.select_option("#head", "mean")
    assert shown() == pytest.approx(
        (float(value(0, 0, 9, 0)) + float(value(0, 1, 9, 0))) / 2, rel=0.01
    )
    page.locator("#canvas").focus()
    page.keyboard.press("[")  # no head before the mean
    page.keyboard.press("]")
    page.keyboard.press("ArrowUp")
    page.keyboard.press("ArrowRight")
    assert readout.inner_text().startswith("query 8")
    assert shown() == pytest.approx(float(value(0, 0, 8, 1)), rel=0.01)
    page.keyboard.press("PageDown")
    assert shown() == pytest.approx(float(value(1, 0, 8, 1)), rel=0.01)
    page.fill("#k1", "4")
    page.keyboard.press("Tab")
    assert page.locator("#k1").input_value() == "4"
    cropped = page.evaluate("document.getElementById('canvas').toDataURL()")
    page.click("#all")
    assert page.locator("#k1").input_value() == "9"
    assert page.evaluate("document.getElementById('canvas').toDataURL()") != cropped
    assert alone(found)


def test_pointing_reads_the_pair_under_the_pointer_and_dragging_zooms(
    browser: Any, tmp_path: Path
) -> None:
    found = opened(
        browser, text_of(records.heatmap()), tmp_path, viewport={"width": 700, "height": 1400}
    )
    page = found.page
    page.locator("#canvas").scroll_into_view_if_needed()
    box = page.locator("#canvas").bounding_box()
    across = box["width"] - 62
    page.mouse.move(box["x"] + 52 + across * 0.05, box["y"] + 8 + across * 0.55)
    assert page.locator("#readout").inner_text().startswith("query 5")
    assert "→ key 0" in page.locator("#readout").inner_text()
    page.mouse.down()
    page.mouse.move(box["x"] + 52 + across * 0.35, box["y"] + 8 + across * 0.85)
    page.mouse.up()
    fields = [page.locator(f"#{name}").input_value() for name in ("q0", "q1", "k0", "k1")]
    assert fields == ["5", "8", "0", "3"]


def test_the_map_is_saved_as_png(browser: Any, tmp_path: Path) -> None:
    found = opened(browser, text_of(records.heatmap()), tmp_path)
    with found.page.expect_download() as download:
        found.page.click("#save")
    path = tmp_path / "saved.png"
    download.value.save_as(path)
    assert download.value.suggested_filename.startswith("attention_layer_1_head_0")
    assert path.read_bytes().startswith(b"\x89PNG")


def test_a_page_fits_a_phone_and_follows_the_dark_mode(browser: Any, tmp_path: Path) -> None:
    text = text_of(records.rollout())
    found = opened(
        browser, text, tmp_path, viewport={"width": 360, "height": 740}, color_scheme="dark"
    )
    assert found.page.evaluate("document.documentElement.scrollWidth") <= 360
    dark = found.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert dark == "rgb(23, 24, 26)"
    light = opened(browser, text, tmp_path)
    assert (
        light.page.evaluate("getComputedStyle(document.body).backgroundColor")
        == "rgb(255, 255, 255)"
    )


@pytest.mark.long
def test_512_tokens_of_64_heads_open_within_five_megabytes(browser: Any, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    one = np.tril(rng.random((8, 512, 512), dtype=np.float32) ** 12)
    record = records.heatmap(side=512)
    arrays = {f"maps/{n}": one for n in range(8)}
    large = AnalysisRecord(
        "heatmap", {**record.values, "layers": [str(n) for n in range(8)]}, arrays
    )
    values = dict(large.values, pooling={"0": [1, 1]}, sizes={"0": [512, 512]})
    text = text_of(AnalysisRecord("heatmap", values, arrays))
    assert len(text.encode()) < 5_000_000
    found = opened(browser, text, tmp_path)
    assert alone(found)


def test_a_first_token_that_gets_most_is_a_warning_and_else_none() -> None:
    page = page_of(records.rollout(share=0.7))
    assert [(each.severity, each.name) for each in page.findings] == [("warning", "first_token")]
    assert "70%" in page.findings[0].text
    assert page.finds("warning")
    assert not page.finds("error")
    assert not page_of(records.rollout(share=0.2)).findings


def test_the_verdict_of_a_rollout_names_what_is_owed_most() -> None:
    page = page_of(records.rollout(share=0.4))
    assert "owes most to “<script>alert(1)</script>” at 0 (40%)" in page.verdict[1]
    assert "40%" in page.verdict[2]


def test_even_causal_attention_is_what_the_first_tokens_share_is_held_against() -> None:
    """The baseline against the product of two dense matrices of even causal attention."""
    even = np.tril(np.ones((10, 10))) / np.arange(1, 11)[:, None]
    layer = (even + np.eye(10)) / 2
    share = (layer @ layer)[9, 0]
    assert f"{share:.0%} by depth alone" in page_of(records.rollout()).verdict[2]


def test_deletions_that_hurt_no_more_than_random_ones_are_a_warning() -> None:
    def effect(k: int, better: float) -> dict[str, float]:
        drops = {"top_drop": 0.1, "top_std": 0.0, "random_drop": 0.2, "random_std": 0.05}
        return {"k": k, "better_than_random": better, "samples": 2, "draws": 8, **drops}

    def page_with(*better: float) -> Any:
        effects = [effect(4**at, share) for at, share in enumerate(better)]
        return page_of(records.rollout(faithfulness={"way": "hidden", "effects": effects}))

    assert [each.name for each in page_with(0.3, 0.5).findings] == ["not_faithful"]
    good = page_with(0.3, 0.9)
    assert not good.findings
    table = next(
        each for section in good.sections for each in section.tables if "nats" in each.caption
    )
    assert list(table.rows[1]) == ["4", "0.1", "0.2 ± 0.05", "90%"]
    assert "deletions" in [picture.name for picture in good.pictures]


def test_an_image_is_read_from_its_class_token() -> None:
    page = page_of(records.images())
    assert "80% to the patches" in page.verdict[1]
    assert "row 1, column 0 (30%; evenly it would be 20%)" in page.verdict[1]
    assert not page.findings


def test_cake_losing_to_recency_is_a_finding_and_winning_is_none() -> None:
    losing = page_of(records.cake(worse=0.2))
    assert [each.name for each in losing.findings] == ["loses_to_recency"]
    assert "12, 20 keys" in losing.findings[0].text
    assert "0.2 nats" in losing.findings[0].text
    assert not page_of(records.cake(worse=-0.2)).findings


def test_what_moves_over_time_is_told_and_keys_to_come_are_no_fault() -> None:
    page = page_of(records.evolution())
    assert "2 layers over 3 generation steps, 0 to 2." in page.verdict
    assert "Normalized entropy moves most in layer 1: from 90% to 30%." in page.verdict
    assert not page.findings


def test_attention_that_is_nan_is_an_error() -> None:
    record = records.heatmap()
    record.arrays["maps/model.layers.1.self_attn"][0, 3] = np.nan
    page = page_of(record)
    assert page.finds("error")
    assert "model.layers.1.self_attn" in page.findings[0].text
    spoilt = records.rollout()
    spoilt.arrays["matrix"][0, 4] = np.nan
    assert page_of(spoilt).finds("error")
    empty = records.cake()
    empty.arrays["shift"][:] = np.nan
    assert page_of(empty).finds("error")


def test_every_picture_of_every_page_can_be_drawn() -> None:
    for record in (
        records.heatmap(),
        records.rollout(samples=1),
        records.images(),
        records.cake(),
        records.evolution(),
    ):
        for picture in page_of(record).pictures:
            figure = picture.draw()
            assert figure.get_suptitle()
            assert picture.caption.rstrip().endswith((".", "itself."))


def test_a_large_picture_stands_in_the_page_as_a_smaller_one(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from stabmon.figures.heatmaps import single_map

    monkeypatch.setattr("stabmon.report.page.INLINE_LIMIT", 20_000)
    figure = single_map(np.random.default_rng(0).random((40, 40)))
    kind, data = encoded(figure, "png")
    small_kind, small = for_page(figure, kind, data)
    assert (kind, small_kind) == ("image/png", "image/png")
    assert len(small) < len(data)
    assert for_page(figure, kind, data[:100]) == (kind, data[:100])


def test_a_record_that_lacks_what_its_page_needs_is_named() -> None:
    with pytest.raises(ValueError, match="the rollout record lacks"):
        page_of(AnalysisRecord("rollout", {}, {}))
    with pytest.raises(ValueError, match="unknown kind 'x'"):
        page_of(AnalysisRecord("x", {}, {}))
