"""The documentation: built strictly, complete, and readable without network."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import fields
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest

from stabmon.analysis.kv_cache import POLICIES
from stabmon.config import StabilityConfig
from stabmon.controllers import CONTROLLERS
from stabmon.guard import Budget
from stabmon.interventions import INTERVENTIONS
from stabmon.rules import RULES
from stabmon.signals import SIGNALS
from stabmon.sinks import SINKS

pytestmark = pytest.mark.long

ROOT = Path(__file__).parents[2]
LEAVES = {
    "signals": SIGNALS,
    "rules": RULES,
    "interventions": INTERVENTIONS,
    "controllers": CONTROLLERS,
    "sinks": SINKS,
    "evictions": POLICIES,
}
LOADS = {"img": "src", "script": "src", "iframe": "src", "source": "src", "link": "href"}
"""Attributes by which a page loads something when it opens."""

pytest.importorskip("material", reason='the documentation needs pip install "stabmon[docs]"')


class Page(HTMLParser):
    """The ids, links and loaded resources of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.text, self.ids = text, set[str]()
        self.links, self.loaded = list[str](), list[str]()
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = {name: value or "" for name, value in attrs}
        self.ids |= {values[name] for name in ("id", "name") if name in values}
        if tag == "a" and "href" in values:
            self.links.append(values["href"])
        if values.get(LOADS.get(tag, "")) and values.get("rel") not in (
            "canonical",
            "prev",
            "next",
        ):
            self.loaded.append(values[LOADS[tag]])


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Build the documentation; any warning ends it."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "-d", str(folder)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def pages(site: Path) -> dict[str, Page]:
    """Return every page by its path."""
    return {
        str(path.relative_to(site)): Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }


@pytest.mark.parametrize("kind", LEAVES)
def test_every_leaf_has_its_entry(kind: str, pages: dict[str, Page]) -> None:
    page = pages[f"reference/{kind}.html"]
    assert set(LEAVES[kind]) <= page.ids


@pytest.mark.parametrize("kind", ["rules", "interventions"])
def test_every_setting_of_a_leaf_is_listed(kind: str, pages: dict[str, Page]) -> None:
    page = pages[f"reference/{kind}.html"]
    for name, cls in LEAVES[kind].items():
        section = page.text.split(f'<h2 id="{name}"')[1].split("<h2 ")[0]
        names = {each.name for each in fields(cls)} - {"issues", "why"}
        assert {each for each in names if f"<code>{each}</code>" not in section} == set()


def test_every_setting_of_a_monitor_is_listed(pages: dict[str, Page]) -> None:
    text = pages["reference/settings.html"].text
    names = [each.name for cls in (StabilityConfig, Budget) for each in fields(cls)]
    assert [each for each in names if f"<td><code>{each}</code></td>" not in text] == []


def test_every_public_name_is_documented(pages: dict[str, Page]) -> None:
    import stabmon

    ids = pages["reference/api.html"].ids
    public = [getattr(stabmon, name) for name in stabmon.__all__]
    assert [each for each in public if f"{each.__module__}.{each.__qualname__}" not in ids] == []
    assert "stabmon.integrations.transformers.StabilityCallback" in ids
    assert "stabmon.integrations.lightning.StabilityCallback" in ids


def test_pages_load_nothing_from_elsewhere(pages: dict[str, Page]) -> None:
    outside = {
        (path, each)
        for path, page in pages.items()
        for each in page.loaded
        if urlsplit(each).scheme or each.startswith("//")
    }
    assert outside == set()
    assert any(page.loaded for page in pages.values())


def test_styles_load_nothing_from_elsewhere(site: Path) -> None:
    sheets = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert sheets
    assert not re.search(r"url\(\s*[\"']?(https?:)?//", "".join(sheets))


def test_links_within_the_site_lead_somewhere(site: Path, pages: dict[str, Page]) -> None:
    broken = [
        (path, link)
        for path, page in pages.items()
        if path != "404.html"  # its links are relative to the root, from wherever it is shown
        for link in page.links
        if not _leads_somewhere(link, path, site, pages)
    ]
    assert broken == []


def test_formulas_are_rendered_at_build_time(pages: dict[str, Page]) -> None:
    assert pages["concepts.html"].text.count("<math") > 30
    raw = [path for path, page in pages.items() if re.search(r"\$[^$<>]*\\\w+[^$<>]*\$", page.text)]
    assert raw == []


def test_the_files_of_the_examples_are_shown(pages: dict[str, Page]) -> None:
    shown = re.sub(r"<[^>]+>", "", pages["extend.html"].text)
    for path in (ROOT / "docs" / "examples" / "my_package").glob("[!_]*.py"):
        assert path.read_text(encoding="utf-8").splitlines()[0].strip('"') in shown


def test_no_role_of_restructured_text_is_left(pages: dict[str, Page]) -> None:
    left = defaultdict(list)
    for path, page in pages.items():
        for role in re.findall(r":(?:class|meth|func|mod|data|attr|math):", page.text):
            left[path].append(role)
    assert left == {}


@pytest.fixture(scope="module")
def browser() -> Iterator[object]:
    import shutil

    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    binary = shutil.which("chromium") or shutil.which("google-chrome")
    if binary is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    with playwright.sync_playwright() as started:
        launched = started.chromium.launch(
            executable_path=binary, args=["--headless", "--no-sandbox", "--disable-gpu"]
        )
        yield launched
        launched.close()


def test_search_works_from_the_disk(site: Path, browser: object) -> None:
    page = browser.new_page()  # type: ignore[attr-defined]
    outside: list[str] = []
    page.on("request", lambda each: outside.append(each.url) if each.url[:5] != "file:" else None)
    page.goto((site / "index.html").as_uri())
    page.fill("input.md-search__input", "qk_clip")
    page.wait_for_selector(".md-search-result__item", timeout=30_000)
    assert "qk_clip" in page.locator(".md-search-result__list").inner_text()
    assert outside == []


def _leads_somewhere(link: str, path: str, site: Path, pages: dict[str, Page]) -> bool:
    """Return whether a link of a page leads to another site, or to a file and an id that exist."""
    parts = urlsplit(link)
    if parts.scheme or parts.netloc:
        return True
    target = (site / path).parent / unquote(parts.path) if parts.path else site / path
    target = Path(os.path.normpath(target))
    target = target / "index.html" if target.is_dir() else target
    page = pages.get(str(target.relative_to(site)))
    if page is None:
        return target.is_file()
    return not parts.fragment or unquote(parts.fragment) in page.ids | {"__top"}
