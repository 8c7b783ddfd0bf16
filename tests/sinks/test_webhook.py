"""The webhook sink against real HTTP servers: one that answers, slow, failing and dead ones."""

import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import stabmon
from stabmon.incidents import incidents_of
from stabmon.records import StabilityIssue
from stabmon.sinks import SINKS, SinkGroup
from stabmon.sinks.background_post import _WAITING
from stabmon.sinks.webhook import WebhookSink
from tests.support.sample_records import META

SECRET = "T0P/SECRET"
RECORD = {
    "intervention": "qk_clip",
    "action": "applied",
    "step": 12,
    "layer": "h.0",
    "head": 1,
    "before": {"max_logit": float("inf")},
    "after": {"max_logit": 50.0},
    "why": "logit_growth at h.0",
}


class Server:
    """A local HTTP server that keeps what is posted to it."""

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.status = 200
        self.first_statuses: list[int] = []
        self.gate = threading.Event()
        self.gate.set()
        self.arrived = threading.Event()
        ours = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                ours.arrived.set()
                ours.gate.wait(60)
                ours.bodies.append(json.loads(body))
                known = ours.first_statuses
                self.send_response(known.pop(0) if known else ours.status)
                if ours.status == 302:
                    self.send_header("Location", "/elsewhere")
                self.end_headers()

            do_GET = do_POST

            def log_message(self, *_: Any) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.http.server_port}/{SECRET}"
        threading.Thread(target=self.http.serve_forever, daemon=True).start()


@pytest.fixture
def server() -> Iterator[Server]:
    made = Server()
    yield made
    made.gate.set()
    made.http.shutdown()
    made.http.server_close()


def incidents(severity: str = "error", step: int = 40) -> list[Any]:
    evidence = {"how": "jump", "value_before": 12.0, "step_before": 30}
    return incidents_of(
        [StabilityIssue(step, "h.0", 2, "logit_growth", severity, 90.0, 48.0, "Clip.", evidence)]
    )


def sent_by(sink: WebhookSink, folder: Path | None = None) -> None:
    sink.open(folder and folder / "stabmon", META)
    sink.write_incidents(incidents())
    sink.write_intervention(RECORD)
    sink.close()


def test_an_incident_and_an_intervention_are_one_json_object_each(server: Server, tmp_path: Path):
    sent_by(WebhookSink(server.url), tmp_path)
    incident, intervention = server.bodies
    (expected,) = incidents()
    assert incident["kind"] == "incident"
    assert incident["text"] == expected.text()
    assert (incident["step"], incident["severity"], incident["layers"]) == (40, "error", ["h.0"])
    assert (incident["title"], incident["advice"]) == (expected.headline, expected.advice)
    assert incident["run"] == str(tmp_path)
    assert intervention["kind"] == "intervention"
    assert (intervention["intervention"], intervention["action"]) == ("qk_clip", "applied")
    assert intervention["text"].startswith("applied qk_clip at h.0 head 1")


def test_slack_gets_the_words_as_text_with_nothing_that_it_would_take_for_markup(server: Server):
    sink = WebhookSink(server.url, format="slack")
    sink.open(None, META)
    sink.write_intervention({**RECORD, "why": "a <b> & c"})
    sink.write_incidents(incidents())
    sink.close()
    first, second = server.bodies
    assert first.keys() == second.keys() == {"text"}
    assert first["text"].startswith("*stabmon, info at step 12*")
    assert "a &lt;b&gt; &amp; c" in first["text"]
    assert incidents()[0].text() in second["text"]


def test_severity_and_rate_limits_decide_what_is_posted(server: Server):
    for least, severity, count in (
        ("error", "warning", 0),
        ("error", "error", 1),
        ("critical", "error", 0),
        ("critical", "critical", 1),
        ("warning", "warning", 1),
    ):
        server.bodies.clear()
        sink = WebhookSink(server.url, min_severity=least)
        sink.open(None, META)
        sink.write_incidents(incidents(severity))
        sink.close()
        assert len(server.bodies) == count, (least, severity)
    server.bodies.clear()
    sink = WebhookSink(server.url)
    sink.open(None, META)
    for _ in range(9):
        sink.write_intervention(RECORD)
    sink.close()
    assert [each["times"] for each in server.bodies] == [1, 2, 4, 8]


def test_the_address_may_come_from_the_environment_and_is_in_no_record(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog
):
    monkeypatch.setenv("STABMON_WEBHOOK_URL", server.url)
    from tests.support.small_runs import batches, gpt2, optimizer_of, train

    model = gpt2()
    optimizer = optimizer_of(model)
    sinks = ["jsonl", "webhook", WebhookSink(server.url)]
    with stabmon.AttentionStabilityMonitor(
        model, optimizer, log_every=1, sinks=sinks, run_dir=tmp_path
    ) as monitor:
        train(model, monitor, optimizer, batches(1))
        model.transformer.wte.weight.data[:] = float("nan")
        train(model, monitor, optimizer, batches(1))
    assert not monitor.errors
    assert len(server.bodies) == 2
    assert {each["cause"] for each in server.bodies} == {"non_finite"}
    for file in (tmp_path / "stabmon").iterdir():
        assert SECRET.encode() not in file.read_bytes()
    assert SECRET not in caplog.text + repr(sinks)


def test_a_server_that_does_not_answer_holds_up_nothing_and_what_is_lost_is_said_once(
    server: Server, caplog
):
    server.gate.clear()
    sink = WebhookSink(server.url, timeout=60)
    group = SinkGroup([sink])
    group.open(None, META)
    group.write_incidents(incidents())
    assert server.arrived.wait(30)
    for number in range(_WAITING + 20):  # a blocking sink would never come back from here
        group.write_intervention({**RECORD, "intervention": f"act_{number}"})
    group.close()
    (said,) = caplog.messages
    lost = _WAITING + 1
    assert said.startswith(
        f"stabmon: {lost + 20} of {lost + 20} messages did not reach the webhook"
    )
    assert "too many waited: 20" in said
    assert f"the run ended: {lost}" in said
    assert SECRET not in caplog.text
    assert not group.failed


def closed_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return int(free.getsockname()[1])


@pytest.mark.parametrize("status", [None, 404, 302, 500])
def test_a_dead_or_refusing_server_is_said_without_the_address(
    server: Server, status: int | None, caplog
):
    server.status = status or 200
    url = server.url if status else f"http://127.0.0.1:{closed_port()}/{SECRET}"
    sent_by(WebhookSink(url))
    *_, last = caplog.messages
    reason = "Connection refused" if status is None else f"HTTP {status}"
    assert last.startswith("stabmon: 2 of 2 messages did not reach the webhook at 127.0.0.1")
    assert reason in last
    assert SECRET not in caplog.text


def test_the_first_failure_is_said_while_training_goes_on(server: Server, monkeypatch, caplog):
    monkeypatch.setattr("stabmon.sinks.background_post._PAUSES", (0.0, 0.0))
    server.status = 404
    sink = WebhookSink(server.url)
    sink.open(None, META)
    for _ in range(2):
        sink.write_intervention(RECORD)
    while not caplog.messages:
        server.arrived.wait(1)
    assert caplog.messages[0].endswith(
        "at 127.0.0.1 (HTTP 404); training goes on, and further failures are counted"
    )
    sink.close()
    assert len(caplog.messages) == 2


def test_a_message_that_met_a_busy_server_is_sent_again(server: Server, monkeypatch, caplog):
    monkeypatch.setattr("stabmon.sinks.background_post._PAUSES", (0.0, 0.0))
    server.first_statuses = [503, 429]
    sink = WebhookSink(server.url)
    sink.open(None, META)
    sink.write_intervention(RECORD)
    while len(server.bodies) < 3:
        server.arrived.wait(1)
    sink.close()
    assert len(server.bodies) == 3
    assert server.bodies[0] == server.bodies[2]
    assert not caplog.messages


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"url": f"ftp://host/{SECRET}"}, "no http"),
        ({"url": f"hooks.slack.com/{SECRET}"}, "no http"),
        ({"url": f"http://[{SECRET}"}, "no http"),
        ({"format": "xml"}, "format 'xml' is none of json, slack"),
        ({"min_severity": "loud"}, "min_severity 'loud' is none of warning, error, critical"),
    ],
)
def test_wrong_arguments_are_refused_without_repeating_the_address(arguments, message):
    with pytest.raises(ValueError, match=message) as raised:
        WebhookSink(**arguments)
    assert SECRET not in str(raised.value)


def test_without_an_address_the_sink_is_left_out_and_says_how_to_give_one(monkeypatch, caplog):
    monkeypatch.delenv("STABMON_WEBHOOK_URL", raising=False)
    group = SinkGroup([SINKS["webhook"]()])
    group.open(None, META)
    assert not group.sinks
    assert "set STABMON_WEBHOOK_URL" in caplog.text


LEFT_OPEN = """
import sys
from stabmon.sinks.webhook import WebhookSink
sink = WebhookSink(sys.argv[1])
sink.open(None, {})
sink.write_intervention({"intervention": "qk_clip", "action": "applied", "step": 1})
"""


def test_a_run_that_never_closes_still_sends_what_waits_as_it_exits(server: Server):
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN, server.url], timeout=120, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert [each["intervention"] for each in server.bodies] == ["qk_clip"]


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_forked_process_sends_by_a_thread_of_its_own(server: Server):
    sink = WebhookSink(server.url)
    sink.open(None, META)
    sink.write_intervention(RECORD)
    child = os.fork()
    if child == 0:  # pragma: no cover
        try:
            sink.write_intervention({**RECORD, "intervention": "of_the_child"})
            sink.close()
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    sink.close()
    assert sorted(each["intervention"] for each in server.bodies) == ["of_the_child", "qk_clip"]
