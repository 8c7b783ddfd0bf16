"""Incidents as lines of text."""

from __future__ import annotations

from rich.text import Text

from stabmon.cli.watching.words import STYLES, cut, printable, wrapped
from stabmon.incidents import Incident


def full(incident: Incident, width: int, height: float) -> list[Text]:
    """Return an incident with its numbers, effects, forecast and advice, in ``height`` lines."""
    lines = [headline(incident, width, incident.title)]
    where = Text(f"  in {printable(incident.where)}")
    where.truncate(width, overflow="ellipsis")
    lines += [where] if incident.layers and height > 2 else []
    sentences = [incident.numbers, incident.effects, incident.forecast]
    facts = ". ".join(each.rstrip(".") for each in sentences if each)
    advice = f"To do: {incident.advice}" if incident.advice else ""
    code = [Text(f"      {printable(each)}", "bold") for each in incident.code.splitlines()]
    said, todo = (wrapped(each, width, indent=2) if each else [] for each in (facts, advice))
    for part in (said, todo, code):
        room = height - len(lines)
        if len(part) > room and part and room >= 1:
            part = part[: int(room)]
            part[-1] = cut(part[-1] + Text(" …"), width)
        lines += part if room >= 1 else []
    return lines


def headline(incident: Incident, width: int, title: str = "") -> Text:
    """Return severity, finding and step on one line, with the location where no title is given."""
    since = f" (since step {incident.first_step})"
    line = Text.assemble((f"  {incident.severity:<8} ", STYLES[incident.severity]))
    line.append(printable(title or incident.headline), "bold")
    line.truncate(max(10, width - len(since)), overflow="ellipsis")
    return line + Text(since)
