"""Pages in a real browser, and all that they ask for and complain of."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

FLAGS = [
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--no-first-run",
]


@dataclass
class Opened:
    """A page in the browser, and all that it asked and complained of."""

    page: Any
    requests: list[str] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


def opened(browser: Any, text: str, folder: Path, **context: Any) -> Opened:
    path = folder / "page.html"
    path.write_text(text, encoding="utf-8")
    found = Opened(browser.new_page(**context))
    found.page.set_default_timeout(30_000)
    found.page.on("request", lambda each: found.requests.append(each.url))
    found.page.on("console", lambda each: found.errors.append(each.text))
    found.page.on("pageerror", lambda each: found.errors.append(str(each)))
    found.page.on("dialog", lambda each: (found.errors.append(each.message), each.dismiss()))
    found.page.goto(path.as_uri())
    if 'id="packed"' in text and context.get("java_script_enabled", True):
        found.page.wait_for_function("document.documentElement.dataset.ready === 'yes'")
    return found


def alone(found: Opened) -> bool:
    """Nothing but the file was asked for, and nothing was complained of."""
    outside = [url for url in found.requests if not url.startswith(("data:", "blob:"))]
    return len(outside) == 1 and not found.errors


def launch(playwright: Any) -> Any:
    """A headless Chromium; the test is skipped where there is none."""
    names = ("chromium", "chromium-browser", "google-chrome")
    binary = next((found for name in names if (found := shutil.which(name))), None)
    if binary is None:
        pytest.skip("no Chromium on this machine: apt install chromium")
    return playwright.chromium.launch(executable_path=binary, args=FLAGS)
