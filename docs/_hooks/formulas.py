"""A Markdown extension: formulas become MathML at build time, so that pages need no script."""

from __future__ import annotations

import re
from xml.etree.ElementTree import Element, SubElement

from latex2mathml.converter import convert
from markdown import Markdown
from markdown.blockprocessors import BlockProcessor
from markdown.extensions import Extension
from markdown.inlinepatterns import InlineProcessor

INLINE = r"(?<![\\$\w])\$(?![\s$])((?:[^$\\]|\\.)+?)(?<!\s)\$(?![\w$])"
BETWEEN_CODE_AND_ESCAPES = 185
"""Priority: after code in backticks (190), before backslash escapes (180)."""


class Formulas(Extension):
    """Formulas in LaTeX: ``$...$`` in a line, ``$$...$$`` as a paragraph of its own."""

    def extendMarkdown(self, md: Markdown) -> None:
        md.inlinePatterns.register(_Inline(INLINE, md), "formula", BETWEEN_CODE_AND_ESCAPES)
        md.parser.blockprocessors.register(_Display(md.parser), "formula", 105)


class _Inline(InlineProcessor):
    def handleMatch(  # type: ignore[override]
        self, m: re.Match[str], data: str
    ) -> tuple[str, int, int]:
        return self.md.htmlStash.store(convert(m[1])), m.start(0), m.end(0)


class _Display(BlockProcessor):
    def test(self, parent: Element, block: str) -> bool:
        text = block.strip()
        return text.startswith("$$") and text.endswith("$$") and len(text) > 4

    def run(self, parent: Element, blocks: list[str]) -> None:
        formula = convert(blocks.pop(0).strip()[2:-2].strip(), display="block")
        SubElement(parent, "p").text = self.parser.md.htmlStash.store(formula)
