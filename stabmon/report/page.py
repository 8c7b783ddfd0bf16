"""A page's content, apart from how it is drawn up; and its drawing up as one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INLINE_LIMIT = 300_000
"""Bytes of a picture from which on a smaller one stands in the page; the file keeps its own."""
PAGE_WIDTH = 1800
"""Pixels across that such a picture is made smaller to."""
SEVERITIES = ("info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """Something that the reader should act on."""

    severity: str
    """``info``, ``warning`` or ``error``."""
    name: str
    """Which finding, one word a kind of finding, such as ``non_finite``."""
    text: str
    """What was found, and what to do."""


@dataclass(frozen=True)
class Table:
    """Rows of text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure that is drawn when it is needed."""

    name: str
    """Of its file, ``<kind>_<name>.png``."""
    caption: str
    """What it shows, in a sentence; also its text for readers who see no pictures."""
    draw: Callable[[], Any]
    """Makes the matplotlib figure."""
    inline: bool = True
    """Stands in the page; else it is a file alone, where the page has the same as HTML."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    fragments: Sequence[str] = ()
    """HTML that is safe already."""


@dataclass(frozen=True)
class Page:
    """All that a page says."""

    kind: str
    title: str
    subject: str
    """The model, in words."""
    verdict: Sequence[str]
    """Paragraphs in words, the main numbers in them."""
    findings: Sequence[Finding] = ()
    facts: Sequence[tuple[str, str]] = ()
    """What was analysed: name and value."""
    sections: Sequence[Section] = ()
    maps: Mapping[str, Any] | None = None
    """The interactive map, see :mod:`stabmon.report.maps`."""
    notes: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """The main numbers, for ``--json``."""

    @property
    def pictures(self) -> list[Picture]:
        """Every picture, in the order of the page."""
        return [picture for section in self.sections for picture in section.pictures]

    def finds(self, fail_on: str) -> bool:
        """Say whether a finding is at least as severe as ``fail_on``."""
        least = SEVERITIES.index(fail_on)
        return any(SEVERITIES.index(finding.severity) >= least for finding in self.findings)


def render(page: Page, pictures: Mapping[str, tuple[str, bytes]]) -> str:
    """Draw up a page as one HTML file.

    Args:
        page: its content.
        pictures: name -> (MIME type, bytes) of every picture, see :func:`encoded`.

    Returns:
        The file's text; it holds no lone surrogate and asks for nothing.

    Raises:
        ImportError: if jinja2 is not installed.
    """
    try:
        from jinja2 import Environment, PackageLoader
    except ImportError as error:
        raise ImportError('jinja2 is not installed: pip install "stabmon[report]"') from error
    from stabmon import __version__

    environment = Environment(
        loader=PackageLoader("stabmon.report"), autoescape=True, trim_blocks=True
    )
    sources = {
        name: f"data:{kind};base64,{base64.b64encode(data).decode()}"
        for name, (kind, data) in pictures.items()
    }
    text: str = environment.get_template("page.html.j2").render(
        page=page, sources=sources, version=__version__
    )
    return text.encode("utf-8", "replace").decode()


def encoded(figure: Any, suffix: str) -> tuple[str, bytes]:
    """Encode a figure for a file: as ``svg`` or ``png``.

    Returns:
        MIME type and bytes.
    """
    from stabmon.figures.canvas import quiet_glyphs, resolution

    kinds = {"svg": "image/svg+xml", "png": "image/png"}
    file = io.BytesIO()
    with quiet_glyphs():
        options = {"pil_kwargs": {"compress_level": 4}} if suffix == "png" else {}
        figure.savefig(file, format=suffix, dpi=resolution(figure), **options)
    return kinds[suffix], file.getvalue()


def for_page(figure: Any, kind: str, data: bytes) -> tuple[str, bytes]:
    """Make an encoded figure small enough for a page: a large one becomes a smaller PNG.

    Pixels are averaged where a picture is made smaller, so that thin lines fade but stay.
    """
    if len(data) <= INLINE_LIMIT:
        return kind, data
    from PIL import Image

    if kind != "image/png":
        kind, data = encoded(figure, "png")
    with Image.open(io.BytesIO(data)) as read:
        picture = read.convert("RGB")
    if picture.width > PAGE_WIDTH:
        height = round(picture.height * PAGE_WIDTH / picture.width)
        picture = picture.resize((PAGE_WIDTH, height), Image.Resampling.BOX)
    file = io.BytesIO()
    picture.quantize(128).save(file, "PNG", optimize=True)
    return kind, min(data, file.getvalue(), key=len)
