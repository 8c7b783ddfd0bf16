"""The keys and signs of ``stabmon watch``, on one page."""

from __future__ import annotations

from rich.text import Text

KEYS = (
    ("j k, ↓ ↑", "next and previous layer"),
    ("Enter", "every signal of the layer: over the steps, and by head"),
    ("n N", "next and previous open incident, with its numbers and what to do"),
    ("/", "show only layers with a text in their name; empty for all"),
    ("s", "next signal in the map: entropy, largest score, ..."),
    ("Esc", "back; also ends the selection and the filter"),
    ("?", "this page"),
    ("q", "leave"),
)
SIGNS = (
    "Each sign of the map is a head of its layer: a bar for its value, or the",
    "first letter of the issue that is open there, capital for an alarm. A letter",
    "before the first head is an issue of the whole layer. × is NaN or infinite.",
    "",
    "'no line for 4 min': the run wrote no reading for that long. It was killed,",
    "waits, or samples rarely; its records do not say which.",
)


def help_lines(width: int, height: int) -> list[Text]:
    """Return the page in at most ``height`` lines."""
    lines = [Text("stabmon watch: keys", "bold"), Text()]
    lines += [Text.assemble((f"  {key:<10}", "bold"), words) for key, words in KEYS]
    lines += [Text(), *(Text(f"  {each}") for each in SIGNS)]
    for line in lines:
        line.truncate(width, overflow="ellipsis")
    return lines[:height]
