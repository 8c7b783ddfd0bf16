"""Alerts and interventions to a webhook: Slack, a pager, a server of one's own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from stabmon._storage import strict_json
from stabmon.incidents import Incident, intervention_text
from stabmon.records import SEVERITIES
from stabmon.sinks.background_post import BackgroundPost
from stabmon.sinks.base import Sink, sink

URL_VARIABLE = "STABMON_WEBHOOK_URL"
Format = Literal["json", "slack"]
_SLACK_LENGTH = 3000
"""Characters of a Slack message; Slack cuts longer ones off at a place of its own."""


@sink
class WebhookSink(Sink):
    """Post incidents worth an alert, and interventions, as JSON.

    Messages are posted by a thread of their own, and training never waits for them: 100 may wait,
    further ones are dropped, and closing takes two seconds at most. What was lost is logged on
    closing. An intervention that comes again and again is posted at its 1st, 2nd, 4th, 8th … time.

    ``format="json"`` has ``kind`` (``incident`` or ``intervention``), ``run``, ``step``,
    ``severity``, ``title``, ``text``, ``advice`` and ``code``, and more fields of each kind.
    ``format="slack"`` has the same in words under ``text``, which Slack, Mattermost and Discord
    (``/slack`` after its URL) show.

    Args:
        url: where to post to; None for the environment variable ``STABMON_WEBHOOK_URL``. It is in
            no log and no record.
        format: ``"json"`` or ``"slack"``.
        min_severity: least severity: ``"warning"`` (also posts each warning that opens),
            ``"error"`` or ``"critical"``.
        timeout: seconds for one connection, and for one answer.

    Raises:
        ValueError: for a URL that is none, or an unknown format or severity; on opening, without a
            URL.

    Example:
        >>> WebhookSink(format="slak")
        Traceback (most recent call last):
        ValueError: format 'slak' is none of json, slack: give one of these
    """

    in_background = False
    """It has a thread of its own, and never waits."""

    def __init__(
        self,
        url: str | None = None,
        *,
        format: Format = "json",
        min_severity: str = "error",
        timeout: float = 5.0,
    ) -> None:
        for name, value, known in (
            ("format", format, get_args(Format)),
            ("min_severity", min_severity, SEVERITIES[1:]),
        ):
            if value not in known:
                raise ValueError(
                    f"{name} {value!r} is none of {', '.join(known)}: give one of these"
                )
        self._format, self._least = format, SEVERITIES.index(min_severity)
        self._timeout = timeout
        self._post = BackgroundPost(url, timeout) if url is not None else None
        self._run = ""
        self._times: Counter[tuple[str, str]] = Counter()

    def open(self, run_dir: Path | None, meta: Mapping[str, Any]) -> None:
        self._run = "" if run_dir is None else str(run_dir.parent)
        if self._post is None:
            url = os.environ.get(URL_VARIABLE)
            if not url:
                raise ValueError(
                    f"no URL to post to: set {URL_VARIABLE}, or give WebhookSink(url=...)"
                )
            self._post = BackgroundPost(url, self._timeout)

    def write_incidents(self, incidents: Sequence[Incident]) -> None:
        for incident in incidents:
            level = SEVERITIES.index(incident.severity)
            is_due = incident.alerts or (incident.state == "opened" and not incident.is_alarm)
            if is_due and level >= self._least:
                self._send(
                    {
                        "kind": "incident",
                        "step": incident.step,
                        "severity": incident.severity,
                        "title": incident.headline,
                        "text": incident.text(),
                        "advice": incident.advice,
                        "code": incident.code,
                        "number": incident.number,
                        "state": incident.state,
                        "cause": incident.cause,
                        "first_step": incident.first_step,
                        "layers": list(incident.layers),
                        "heads": incident.heads,
                    }
                )

    def write_intervention(self, record: Mapping[str, Any]) -> None:
        name, action = (str(record.get(key, "")) for key in ("intervention", "action"))
        self._times[name, action] += 1
        times = self._times[name, action]
        if times & (times - 1):
            return
        text = intervention_text(record)
        self._send(
            {
                "kind": "intervention",
                "step": record.get("step"),
                "severity": "info",
                "title": f"intervention {name} {action}".replace("  ", " "),
                "text": text,
                "advice": "",
                "code": "",
                "intervention": name,
                "action": action,
                "times": times,
            }
        )

    def close(self) -> None:
        if self._post is not None:
            self._post.close()

    def _send(self, message: Mapping[str, Any]) -> None:
        if self._post is None:
            return
        whole = {"schema_version": 1, "source": "stabmon", "run": self._run, **message}
        body = _for_slack(whole) if self._format == "slack" else whole
        self._post.put(strict_json.dumps(body).encode())


def _for_slack(message: Mapping[str, Any]) -> dict[str, str]:
    """Return a message in words, in Slack's markup."""
    of = f" of {message['run']}" if message["run"] else ""
    lines = [
        f"*stabmon, {message['severity']} at step {message['step']}{of}*",
        str(message["text"]),
        str(message["advice"]),
    ]
    text = _escaped("\n".join(filter(None, lines)))[:_SLACK_LENGTH]
    return {"text": text + (f"\n```{_escaped(message['code'])}```" if message["code"] else "")}


def _escaped(text: str) -> str:
    """Return text in which no character opens a link or an entity of Slack's."""
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
