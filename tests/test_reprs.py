"""How objects print: one line, and small, escaped HTML in a notebook."""

from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest
import torch

import stabmon
from stabmon.diagnosis import Diagnosis
from stabmon.incidents import incidents_of
from stabmon.integrations.transformers import StabilityCallback
from stabmon.records import StabilityIssue
from tests.support.small_runs import batches, gpt2, optimizer_of, train
from tests.support.written_records import collapse

EVIL = "<script>alert('h.0')</script>"


class Balanced(HTMLParser):
    """Collect text and names of elements, and check that they are closed in order."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.seen: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.open.append(tag)
        self.seen.add(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data


def shown(thing: Any) -> str:
    """The text of an object's HTML, which is well formed, small and without script or colour of
    text and ground.
    """
    html, parser = thing._repr_html_(), Balanced()
    parser.feed(html)
    assert not parser.open
    assert parser.seen <= {"div", "b", "table", "tr", "th", "td", "pre"}
    assert len(html) < 20_000
    assert "background:#" not in html
    assert ";color:#" not in html
    assert "\n" not in repr(thing)
    assert len(repr(thing)) < 300
    return parser.text


@pytest.fixture(scope="module")
def run() -> Any:
    """A monitor of a few steps with an issue, its last diagnosis, and an intervention by hand."""
    model = gpt2()
    optimizer = optimizer_of(model, 1e-3)
    monitor = stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[])
    given = train(model, monitor, optimizer, batches(2))
    with torch.no_grad():
        model.transformer.h[0].attn.c_attn.weight[:, :64].mul_(60.0)
    given += train(model, monitor, optimizer, batches(2))
    from stabmon.interventions.lower_learning_rate import LowerLearningRate

    applied = monitor.apply(LowerLearningRate(factor=0.5, where="all"))
    yield monitor, given[-1], applied
    monitor.close()


def test_a_monitor_shows_its_run_at_a_glance(run: Any) -> None:
    monitor, _, _ = run
    assert monitor.incidents
    text = shown(monitor)
    assert "step=4" in text
    assert "2 layers, 8 heads" in text
    assert monitor.incidents[-1].title in text
    assert "last reading: Reading(step=4" in text
    assert "1 intervention, 1 active" in text


def test_a_monitor_before_its_first_step_says_so() -> None:
    with stabmon.AttentionStabilityMonitor(torch.nn.Linear(2, 2), sinks=[]) as monitor:
        assert "no step yet" in repr(monitor)
        assert "no reading yet" in shown(monitor)
    assert "closed" in repr(monitor)


def test_a_diagnosis_shows_incidents_before_the_map(run: Any) -> None:
    _, diagnosis, _ = run
    text = shown(diagnosis)
    assert "transformer.h.1.attn " in text
    assert "share of ln n" in text
    opened = Diagnosis(
        7,
        (),
        {EVIL: {"normalized_entropy": np.array([0.0, 1.0, 0.5, np.nan])}},
        open_issues=(collapse(5, layer=EVIL, head=1),),
        incidents=tuple(incidents_of([collapse(7, layer=EVIL)])),
    )
    text = shown(opened)
    assert text.index(opened.incidents[0].title) < text.index("▁E▄×")
    assert EVIL in text
    assert "E: entropy_collapse is open" in text
    assert "no attention was measured" in shown(Diagnosis(1, (), {}))


def test_a_large_model_stays_small() -> None:
    stats = {f"h.{n}.attn": {"max_logit": np.arange(128.0)} for n in range(200)}
    assert "40 of 200 layers" in shown(Diagnosis(1, (), stats))


@pytest.mark.parametrize("threshold", [0.1, float("inf"), 3.4e38])
def test_an_issue_names_no_limit_that_no_number_reaches(threshold: float) -> None:
    issue = collapse(7, layer=EVIL, threshold=threshold, suggestion="<b>Lower</b> it.")
    for text in (repr(issue), shown(issue)):
        assert ("threshold" in text) is (threshold == 0.1)
        assert f"{EVIL} head 1" in text
    assert "<b>Lower</b> it." in shown(issue)
    assert "in about 230 steps" in shown(issue)
    assert "run" in repr(StabilityIssue(1, None, None, "loss_spike", "error", 1.0, 2.0, ""))


def test_an_incident_shows_what_to_do(run: Any) -> None:
    monitor, _, _ = run
    incident = monitor.incidents[-1]
    text = shown(incident)
    for part in (incident.headline, incident.numbers, incident.advice, incident.code):
        assert " ".join(part.split()) in " ".join(text.split())


def test_an_applied_intervention_says_what_it_did(run: Any) -> None:
    _, _, applied = run
    assert repr(applied) == "Applied(lower_learning_rate, step=4, active)"
    assert "applied lower_learning_rate" in shown(applied)


def test_a_report_shows_findings_with_what_to_do() -> None:
    layer = torch.nn.TransformerEncoderLayer(32, 2, batch_first=True)
    inputs = torch.randn(1, 16, 32)
    report = stabmon.check_attention_stability(layer, inputs)
    assert repr(report).startswith("StabilityReport(pass, ")
    assert "no finding" in shown(report)
    with torch.no_grad():
        layer.self_attn.in_proj_weight[:64] *= 100.0
    failed = stabmon.check_attention_stability(layer, inputs)
    assert failed.verdict == "fail"
    assert failed.recommendations[0].partition(" (")[0] in shown(failed)


def test_a_callback_shows_its_monitor() -> None:
    callback = StabilityCallback(log_every=5)
    assert repr(callback) == "StabilityCallback(log_every=5, no training yet)"
    assert "no training yet" in shown(callback)
    with stabmon.AttentionStabilityMonitor(torch.nn.Linear(2, 2), sinks=[]) as monitor:
        callback.monitor = monitor
        assert "no reading yet" in shown(callback)
        assert "AttentionStabilityMonitor(no step yet" in repr(callback)
