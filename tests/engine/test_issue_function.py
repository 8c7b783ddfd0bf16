"""``on_issue``: called with each issue, and unable to change training."""

import logging
import random

import numpy as np
import pytest
import torch

import stabmon
from tests.support.small_runs import batches, clean, gpt2, optimizer_of, same_bits, train, weights


def run(on_issue, log_every=1, **options):
    """Six steps; the fourth has a rate that issues follow from."""
    model = gpt2(dropout=0.1)
    torch.manual_seed(5)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)

    def between(step):
        optimizer.param_groups[0]["lr"] = 1e4 if step == 4 else 0.05

    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, log_every=log_every, sinks=[], on_issue=on_issue, **options
    )
    with monitor:
        given = train(model, monitor, optimizer, batches(6), clip=None, between=between)
    return monitor, model, given


def test_it_is_called_with_each_issue_in_order():
    seen = []
    monitor, model, _ = run(seen.append)
    assert seen
    assert seen == monitor.issues
    assert not monitor.errors
    assert clean(model)


def test_it_cannot_change_training():
    calls = []

    def meddles(issue):
        calls.append(issue)
        random.random()
        np.random.rand()  # noqa: NPY002
        torch.rand(3)
        torch.manual_seed(99)
        torch.set_grad_enabled(False)
        model_of[0].eval()
        model_of[0](input_ids=batches(1)[0])
        issue.evidence.clear()
        return "anything"

    model_of = []
    make = stabmon.AttentionStabilityMonitor.__init__

    def keeps(self, model, *args, **kwargs):
        model_of.append(model)
        make(self, model, *args, **kwargs)

    plain, expected, readings = run(None)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stabmon.AttentionStabilityMonitor, "__init__", keeps)
        monitor, model, again = run(meddles)
    assert len(calls) == len(plain.issues) > 0
    assert same_bits(weights(expected), weights(model))
    assert model.training
    assert torch.is_grad_enabled()
    assert repr(monitor.issues) == repr(plain.issues)
    assert [each and each.step for each in again] == [each and each.step for each in readings]
    assert not monitor.errors


def test_an_exception_in_it_is_counted_and_logged_once(caplog):
    def fails(issue):
        raise SystemError("planted")

    monitor, model, _ = run(fails)
    assert monitor.errors == {"on_issue": len(monitor.issues)}
    errors = [each for each in caplog.records if each.levelno >= logging.ERROR]
    assert [each.getMessage() for each in errors] == [
        "stabmon: on_issue failed and is skipped, training goes on: planted"
    ]
    assert clean(model)


def test_it_may_close_the_monitor():
    holder = []
    seen = []

    def closes(issue):
        seen.append(issue)
        holder[0].close()

    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = stabmon.AttentionStabilityMonitor(
        model, optimizer, log_every=1, sinks=[], on_issue=closes
    )
    holder.append(monitor)
    train(model, monitor, optimizer, batches(1))
    with torch.no_grad():
        model.transformer.wte.weight[:] = float("nan")
    train(model, monitor, optimizer, batches(2))
    assert seen
    assert clean(model)
    assert not monitor.errors


def test_what_is_no_function_is_refused():
    with pytest.raises(TypeError, match="on_issue is a str: give a function"):
        stabmon.AttentionStabilityMonitor(gpt2(), on_issue="print")
