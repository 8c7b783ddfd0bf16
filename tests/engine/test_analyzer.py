"""Any model's attention, outside of training."""

import logging

import pytest
import torch
from torch import nn

import stabmon
from tests.support.small_runs import Floats, HalfSeen, batches, clean, gpt2, same_readings


def test_statistics_are_gathered_over_batches_and_equal_those_of_training():
    model = gpt2().eval()
    tokens = batches(1, rows=8)[0]
    analyzer = stabmon.AttentionAnalyzer(model)
    with torch.no_grad():
        for part in tokens.split(2):
            model(input_ids=part)
    diagnosis = analyzer.diagnose()
    monitor = stabmon.AttentionStabilityMonitor(model.train(), sinks=[], log_every=1)
    model(input_ids=tokens)
    trained = monitor.on_step()
    monitor.close()
    assert same_readings(diagnosis.stats, trained.stats, 1e-6)
    assert diagnosis.stats["transformer.h.0.attn"]["max_logit"].shape == (4,)
    assert clean(model)


def test_nothing_is_left_after_diagnosing_nor_after_leaving_the_context():
    model = Floats()
    analyzer = stabmon.AttentionAnalyzer(model)
    assert not clean(model)
    model(torch.randn(2, 6, 32))
    first = analyzer.diagnose()
    assert clean(model)
    model(torch.randn(2, 6, 32))
    assert same_readings(first.stats, analyzer.diagnose().stats)
    analyzer.close()
    with pytest.raises(RuntimeError, match="planted"), stabmon.AttentionAnalyzer(model):
        raise RuntimeError("planted")
    assert clean(model)


def test_in_a_context_more_can_be_gathered_after_a_diagnosis():
    model = Floats()
    with stabmon.AttentionAnalyzer(model, ["max_logit"]) as analyzer:
        model(torch.zeros(2, 6, 32))
        first = analyzer.diagnose().stats["first"]["max_logit"]
        model(torch.randn(2, 6, 32) * 10)
        assert (analyzer.diagnose().stats["first"]["max_logit"] > first).all()
    assert clean(model)


def test_no_attention_is_an_error_that_says_what_was_looked_for():
    model = nn.Sequential(nn.Linear(2, 2))
    with stabmon.AttentionAnalyzer(model) as analyzer:
        with pytest.raises(RuntimeError, match="run the model first"):
            analyzer.diagnose()
        model(torch.ones(1, 2))
        with pytest.raises(RuntimeError, match="scaled_dot_product_attention"):
            analyzer.diagnose()


def test_a_call_that_cannot_be_measured_is_an_error_and_not_a_gap(monkeypatch):
    def no(*_, **__):
        raise MemoryError("planted")

    monkeypatch.setattr("stabmon.signals.accumulator.operator_of", no)
    model = Floats()
    with stabmon.AttentionAnalyzer(model) as analyzer:
        model(torch.randn(2, 6, 32))
        with pytest.raises(RuntimeError, match="planted"):
            analyzer.diagnose()


def test_what_a_single_reading_can_tell_is_an_issue():
    model = Floats()
    with torch.no_grad():
        model.first.q.weight[8:16] *= 1e20
    with stabmon.AttentionAnalyzer(model) as analyzer:
        model(torch.randn(2, 6, 32))
        found = {
            (issue.issue_type, issue.layer, issue.head) for issue in analyzer.diagnose().issues
        }
    assert {
        (layer, head) for issue_type, layer, head in found if issue_type == "precision_insufficient"
    } == {("first", 1)}


def test_bad_arguments_are_refused():
    with pytest.raises(TypeError, match=r"give a torch\.nn\.Module"):
        stabmon.AttentionAnalyzer("gpt2")
    with pytest.raises(ValueError, match="did you mean 'max_logit'"):
        stabmon.AttentionAnalyzer(Floats(), ["max_logits"])


def test_a_diagnosis_names_what_is_not_seen_and_warns_once(caplog):
    model = HalfSeen()
    with (
        caplog.at_level(logging.WARNING),
        stabmon.AttentionAnalyzer(model) as analyzer,
        torch.no_grad(),
    ):
        model(torch.randn(2, 5, 12))
        diagnosis = analyzer.diagnose()
        analyzer.diagnose()
    assert list(diagnosis.stats) == ["first"]
    assert dict(diagnosis.unseen) == {"second": "a softmax of a product"}
    assert (
        caplog.text.count(
            "stabmon sees 1 of 2 attention modules in full; not seen: second (a softmax of a "
            "product)"
        )
        == 1
    )


def test_where_nothing_is_seen_the_error_names_what_was_met():
    model = HalfSeen().second
    with stabmon.AttentionAnalyzer(model) as analyzer:
        model(torch.randn(2, 5, 12))
    with pytest.raises(
        RuntimeError,
        match=r"no attention was found.* and PackedAttention \(a softmax of a product\) is none "
        r"of these",
    ):
        analyzer.diagnose()
