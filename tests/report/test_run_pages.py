"""Pages of stored runs in a real browser: without script, by keyboard, on a phone, compared."""

import csv
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import stabmon
from stabmon._storage import strict_json
from stabmon.controllers import ControllerWatch, attach_controllers
from stabmon.records import Reading, StabilityIssue
from stabmon.report.run.loading import Run, load_run, load_runs
from stabmon.report.run.page import run_page
from tests.support.browser_pages import Opened, alone, opened
from tests.support.small_runs import batches, gpt2
from tests.support.stored_runs import HOSTILE, write_run

FACE = "document.querySelector('#grids canvas').toDataURL()"
"""The first map's pixels."""


def value_said(found: Opened, at: int = 0) -> str:
    """The value in the line below a map."""
    text: str = found.page.locator("#grids .said").nth(at).inner_text()
    return text.partition(": ")[2].partition(" ")[0]


def expected(run: Run, signal: str, layer: int, head: int, row: int = -1) -> str:
    columns = [*run.signals.places().values()][layer]
    value = float(run.signals.values[signal][row, columns.start + head])
    return (
        f"{value:.3g}".removesuffix(".0").rstrip("0") if "." in f"{value:.3g}" else f"{value:.3g}"
    )


def test_pages_of_every_kind_of_run_open_alone_and_say_their_verdict(
    browser: Any, stored: dict[str, Path], tmp_path: Path
) -> None:
    context = browser.new_context()
    for name, folder in stored.items():
        run = load_run(folder)
        found = opened(context, run_page([run]), tmp_path)
        assert alone(found), (name, found.requests, found.errors)
        assert found.page.locator("#verdict strong").inner_text()
        assert found.page.locator("#timeline svg.wide").count() == (name != "empty")
        found.page.close()
    context.close()


def test_without_javascript_the_verdict_timeline_and_tables_stand(
    browser: Any, stored: dict[str, Path], tmp_path: Path
) -> None:
    run = load_run(stored["damaged"])
    found = opened(browser, run_page([run]), tmp_path, java_script_enabled=False)
    page = found.page
    assert page.locator("#verdict strong").inner_text().startswith("Attention is being damaged")
    assert page.locator("#verdict pre code").inner_text()
    assert page.locator("#timeline svg.wide path.curve").count() == 2
    assert page.locator("#timeline svg.wide .bar.error").count() >= 1
    assert "need JavaScript" in page.locator("#maps").inner_text()
    assert not page.locator("#interactive").is_visible()
    caption = page.locator("caption", has_text="Every issue")
    rows = caption.locator("xpath=..").locator("tbody tr")
    assert rows.count() == len(run.records.issues)
    page.close()


def test_the_slider_moves_maps_and_charts_by_keyboard(
    browser: Any, stored: dict[str, Path], tmp_path: Path
) -> None:
    run = load_run(stored["damaged"])
    found = opened(browser, run_page([run]), tmp_path)
    page = found.page
    assert page.locator("#at").inner_text().startswith("step 60.")
    smallest_step = 1 / 65535  # values travel in 16 bits
    last = float(run.signals.values["normalized_entropy"][-1, 0])
    assert float(value_said(found)) == pytest.approx(last, abs=smallest_step)
    before, cursor = (
        page.evaluate(FACE),
        page.locator("#timeline .wide .cursor").get_attribute("x1"),
    )
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert page.locator("#at").inner_text().startswith("step 1.")
    assert page.locator("#step").get_attribute("aria-valuetext") == "step 1"
    assert value_said(found) == expected(run, "normalized_entropy", 0, 0, 0)
    assert page.evaluate(FACE) != before
    assert page.locator("#timeline .wide .cursor").get_attribute("x1") != cursor
    page.keyboard.press("ArrowRight")
    assert page.locator("#at").inner_text().startswith("step 2.")
    page.select_option("#signal1", "precision_bits")
    assert value_said(found, 1) == expected(run, "precision_bits", 0, 0, 1)
    assert alone(found)
    page.close()


def test_a_head_is_opened_by_keyboard_and_by_its_link(
    browser: Any, stored: dict[str, Path], tmp_path: Path
) -> None:
    run = load_run(stored["damaged"])
    found = opened(browser, run_page([run]), tmp_path)
    page = found.page
    page.locator("#grids canvas").first.focus()
    for key in ("ArrowDown", "ArrowRight", "ArrowRight", "["):
        page.keyboard.press(key)
    assert page.locator("#at").inner_text().startswith("step 59.")
    assert value_said(found) == expected(run, "normalized_entropy", 1, 2, -2)
    page.keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "head"
    assert page.locator("#head-title").inner_text().startswith("transformer.h.1.attn head 2")
    assert page.evaluate("location.hash") == "#transformer.h.1.attn.2"
    assert page.locator("#lines svg").count() == len(run.signals.values)
    assert "largest" in page.locator("#lines svg").nth(1).get_attribute("aria-label")
    assert "W_q" not in page.locator("#head-issues").inner_text()
    assert "error, logit growth of the whole layer" in page.locator("#head-issues").inner_text()
    page.keyboard.press("Escape")
    assert page.evaluate("document.activeElement.tagName") == "CANVAS"
    page.goto("about:blank")
    page.goto((tmp_path / "page.html").as_uri() + "#transformer.h.0.attn.3")
    page.wait_for_function("document.documentElement.dataset.ready === 'yes'")
    assert page.locator("#head-title").inner_text().startswith("transformer.h.0.attn head 3")
    page.select_option("#layer", "transformer.h.1.attn")
    page.select_option("#number", "1")
    assert page.evaluate("location.hash") == "#transformer.h.1.attn.1"
    page.close()


def test_pointing_reads_and_clicking_opens(
    browser: Any, stored: dict[str, Path], tmp_path: Path
) -> None:
    run = load_run(stored["damaged"])
    found = opened(browser, run_page([run]), tmp_path)
    page, canvas = found.page, found.page.locator("#grids canvas").nth(1)
    canvas.scroll_into_view_if_needed()
    box = canvas.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 12, box["y"] + 16 + 45)
    assert value_said(found, 1) == expected(run, "max_logit", 1, 3)
    page.mouse.down()
    page.mouse.up()
    assert page.evaluate("location.hash") == "#transformer.h.1.attn.3"
    page.locator("#timeline svg.wide").scroll_into_view_if_needed()
    box = page.locator("#timeline svg.wide").bounding_box()
    page.mouse.click(box["x"] + box["width"] / 2, box["y"] + 40)
    assert 20 < int(re.findall(r"\d+", page.locator("#at").inner_text())[0]) < 40
    page.close()


def test_two_runs_share_axes_steps_and_a_list_of_differences(
    browser: Any, stored: dict[str, Path], tmp_path: Path
) -> None:
    runs = load_runs([(stored["healthy"], None), (stored["damaged"], None)])
    found = opened(browser, run_page(runs), tmp_path)
    page = found.page
    assert page.locator("#verdict article").count() == 2
    assert "12" in page.locator("#differences").inner_text()
    spans = page.locator("#timeline svg.wide").evaluate_all("all => all.map(e => e.dataset.last)")
    assert spans == ["60", "60"]
    letters = page.locator("#comparison svg.wide .letter").all_text_contents()
    assert letters == ["A", "B"] * 3
    assert page.locator("#grids canvas").count() == 4
    assert "A: ended at 12" in page.locator("#at").inner_text()
    page.locator("#step").focus()
    page.keyboard.press("Home")
    assert value_said(found, 0) == expected(runs[0], "normalized_entropy", 0, 0, 0)
    assert value_said(found, 2) == expected(runs[1], "normalized_entropy", 0, 0, 0)
    assert page.locator("#lines svg").first.locator("path.curve").count() == 2
    assert alone(found)
    page.close()


def test_a_hostile_name_stays_text(browser: Any, tmp_path: Path) -> None:
    values = {HOSTILE: {"max_logit": np.array([1.0, 2.0])}, "</script>b": {"max_logit": np.ones(2)}}
    sink = write_run(tmp_path / "run", [Reading(1, 1.0, values), Reading(2, 1.0, values)])
    sink.write_issue(StabilityIssue(2, HOSTILE, 1, "logit_growth", "error", 2.0, 1.0, "<b>no</b>"))
    sink.close()
    found = opened(browser, run_page([load_run(tmp_path / "run")]), tmp_path)
    page = found.page
    assert page.locator("main img, main script").count() == 0
    assert HOSTILE in page.locator("#verdict").inner_text()
    page.locator("#grids canvas").first.focus()
    page.keyboard.press("Enter")
    assert page.locator("#head-title").inner_text().startswith(f"{HOSTILE} head 0")
    page.reload()
    page.wait_for_function("document.documentElement.dataset.ready === 'yes'")
    assert page.locator("#head-title").inner_text().startswith(f"{HOSTILE} head 0")
    assert not found.errors
    page.close()


def test_the_page_fits_a_phone_follows_the_dark_mode_and_moves_nothing(
    browser: Any, stored: dict[str, Path], tmp_path: Path
) -> None:
    runs = load_runs([(stored["damaged"], None), (stored["guarded"], None)])
    found = opened(
        browser,
        run_page(runs),
        tmp_path,
        viewport={"width": 360, "height": 740},
        color_scheme="dark",
        reduced_motion="reduce",
        device_scale_factor=1,
    )
    page = found.page
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(23, 24, 26)"
    assert page.evaluate("getComputedStyle(document.documentElement).scrollBehavior") == "auto"
    assert page.locator("#timeline svg.narrow").first.is_visible()
    assert not page.locator("#timeline svg.wide").first.is_visible()
    corner = "[...document.querySelector('canvas').getContext('2d').getImageData(1, 1, 1, 1).data]"
    assert page.evaluate(corner) == [23, 24, 26, 255]
    page.close()


def test_numbers_and_figures_are_saved_from_the_page(browser: Any, tmp_path: Path) -> None:
    values = np.array([1.5, np.nan, np.inf, 12345.0])
    readings = [Reading(step, 1.0, {"=attn": {"max_logit": values * step}}) for step in (1, 2)]
    write_run(tmp_path / "run", readings).close()
    found = opened(browser, run_page([load_run(tmp_path / "run")]), tmp_path)

    def saved(button: str) -> bytes:
        with found.page.expect_download() as download:
            found.page.locator(button).first.click()
        path = tmp_path / download.value.suggested_filename
        download.value.save_as(path)
        return path.read_bytes()

    rows = list(csv.DictReader(saved("#csv").decode().splitlines()))
    assert [row["layer"] for row in rows] == ["'=attn"] * 8
    assert [row["max_logit"] for row in rows[:3]] == ["1.5", "nan", "inf"]
    assert float(rows[7]["max_logit"]) == pytest.approx(24690, rel=1e-4)
    numbers = json.loads(saved("#json"))
    assert numbers["runs"][0]["last_steps"] == [1, 2]
    assert numbers["runs"][0]["signals"]["max_logit"]["max"][0][1] == ["nan", "nan"]
    picture = saved("#timeline .tools button").decode()
    assert picture.startswith("<svg")
    assert "stroke: var(--run0)" in picture
    assert saved("#timeline .tools button:nth-child(2)").startswith(b"\x89PNG")
    assert saved("#grids .tools button").startswith(b"\x89PNG")
    assert not found.errors
    found.page.close()


def test_a_stored_check_shows_its_region(stored: dict[str, Path], tmp_path: Path) -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
    report = stabmon.check_attention_stability(layer, torch.randn(1, 16, 32), {"region": True})
    write_run(tmp_path / "run", [Reading(1, 1.0, {})]).close()
    (tmp_path / "run" / "check.json").write_text(strict_json.dumps(report.to_dict()))
    text = run_page([load_run(tmp_path / "run")])
    assert "Stability region" in text
    assert len(re.findall(r'class="\w+ own"', text)) == 6
    (tmp_path / "run" / "check.json").write_text("{")
    assert "Stability region" not in run_page([load_run(tmp_path / "run")])


def test_records_of_controllers_show_their_kl_and_gain(browser: Any, tmp_path: Path) -> None:
    model = gpt2()
    attach_controllers(model, "info_density", form="query_gain")
    with ControllerWatch(model, run_dir=tmp_path / "run"), torch.no_grad():
        for tokens in batches(3):
            model(input_ids=tokens)
    run = load_run(tmp_path / "run")
    assert (run.unit, run.state) == ("forward", "ended")
    found = opened(browser, run_page([run]), tmp_path)
    assert (
        "KL to the attention without controllers"
        in found.page.locator("#controllers svg.wide").inner_html()
    )
    assert found.page.locator("#signal0").input_value() == "controller_kl"
    assert found.page.locator("#signal1").input_value() == "query_gain"
    assert alone(found)
    found.page.close()
