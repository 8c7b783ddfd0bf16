"""The content of a page, and its rendering as one HTML file."""

from __future__ import annotations

import base64
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

INLINE_LIMIT = 300_000
"""Largest picture in a page, in bytes; larger ones are shrunk in the page only."""
PAGE_WIDTH = 1800
"""Width of shrunk pictures in pixels."""
SEVERITIES = ("info", "warning", "error")


@dataclass(frozen=True)
class Finding:
    """An observation that calls for action."""

    severity: str
    """``info``, ``warning`` or ``error``."""
    name: str
    """Kind of finding, such as ``non_finite``."""
    text: str
    """Observation and advice."""


@dataclass(frozen=True)
class Table:
    """A table of text."""

    caption: str
    head: Sequence[str]
    rows: Sequence[Sequence[str]]


@dataclass(frozen=True)
class Picture:
    """A figure drawn on demand."""

    name: str
    """Name within its file name, ``<kind>_<name>.png``."""
    caption: str
    """Description in a sentence; also the alternative text."""
    draw: Callable[[], Any]
    """Function that makes the matplotlib figure."""
    inline: bool = True
    """True if it stands in the page; False for a file alone, beside the same as HTML."""


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    title: str
    paragraphs: Sequence[str] = ()
    tables: Sequence[Table] = ()
    pictures: Sequence[Picture] = ()
    fragments: Sequence[str] = ()
    """HTML, escaped already."""


@dataclass(frozen=True)
class Page:
    """The content of a page."""

    kind: str
    title: str
    subject: str
    """The model, in words."""
    verdict: Sequence[str]
    """Paragraphs with the main numbers in words."""
    findings: Sequence[Finding] = ()
    facts: Sequence[tuple[str, str]] = ()
    """Name and value of the analysed things."""
    sections: Sequence[Section] = ()
    maps: Mapping[str, Any] | None = None
    """Interactive map, see :mod:`stabmon.report.maps`."""
    notes: Sequence[str] = ()
    numbers: Mapping[str, Any] = field(default_factory=dict)
    """Main numbers, for ``--json``."""

    @property
    def pictures(self) -> list[Picture]:
        """All pictures, in the order of the page."""
        return [picture for section in self.sections for picture in section.pictures]

    def finds(self, fail_on: str) -> bool:
        """Return True if a finding is at least as severe as ``fail_on``."""
        least = SEVERITIES.index(fail_on)
        return any(SEVERITIES.index(finding.severity) >= least for finding in self.findings)


def render(page: Page, pictures: Mapping[str, tuple[str, bytes]]) -> str:
    """Render a page as one HTML file.

    Args:
        page: its content.
        pictures: name -> (MIME type, bytes) of every picture, see :func:`encoded`.

    Returns:
        The file's text, without lone surrogates and without requests.

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
    """Encode a figure for a file.

    Args:
        figure: matplotlib's figure.
        suffix: ``svg`` or ``png``.

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
    """Shrink an encoded figure that is too large for a page to a smaller PNG.

    Pixels are averaged, so that thin lines fade but stay.

    Args:
        figure: matplotlib's figure.
        kind: its MIME type.
        data: the encoded figure.

    Returns:
        MIME type and bytes.
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
