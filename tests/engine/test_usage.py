"""One warning where nothing will ever be measured, and none in a run that is in order."""

import copy
import logging

import pytest
import torch

import stabmon
from tests.support.small_runs import Floats, batches, clean, gpt2, optimizer_of, train


def watched(model, optimizer, **options):
    return stabmon.AttentionStabilityMonitor(model, optimizer, sinks=[], **options)


def warnings_of(caplog):
    return [each.getMessage() for each in caplog.records if each.levelno >= logging.WARNING]


def test_a_run_in_order_says_nothing(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)
    with watched(model, optimizer, log_every=2) as monitor:
        train(model, monitor, optimizer, batches(2))
    assert warnings_of(caplog) == []


def test_a_run_shorter_than_its_interval_is_named_with_one_that_fits(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watched(model, optimizer, log_every=50, schedule="fixed")
    train(model, monitor, optimizer, batches(20))
    monitor.close()
    monitor.close()
    (said,) = warnings_of(caplog)
    assert said == (
        "stabmon measures attention at no step: log_every=50 and the run had 20 optimizer steps; "
        "set log_every=2"
    )


def test_a_run_that_an_exception_cut_short_is_not_told_so(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)

    def breaks_off(step):
        if step == 2:
            raise RuntimeError("planted")

    with pytest.raises(RuntimeError, match="planted"), watched(model, optimizer) as monitor:
        train(model, monitor, optimizer, batches(2), between=breaks_off)
    assert warnings_of(caplog) == []


def test_on_step_that_is_never_called_is_named_at_the_end(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)
    with watched(model, optimizer):
        train(model, None, optimizer, batches(3))
    (said,) = warnings_of(caplog)
    assert "3 optimizer steps and 3 forwards" in said
    assert "call monitor.on_step(loss) once after each optimizer step" in said


def test_on_step_that_is_never_called_is_named_while_training_still_goes_on(caplog):
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watched(model, optimizer)
    for step in range(101):
        assert (len(warnings_of(caplog)) == 1) == (step >= 100)
        model(torch.zeros(1, 2, 32)).sum().backward()
        optimizer.step()
    monitor.close()
    assert len(warnings_of(caplog)) == 1
    assert clean(model)


def test_a_monitor_that_saw_no_training_says_nothing(caplog):
    model = gpt2()
    with watched(model, optimizer_of(model)), torch.no_grad():
        model(input_ids=batches(1)[0])
    assert warnings_of(caplog) == []


def test_without_an_optimizer_it_is_said_once_what_is_left_out(caplog):
    model = gpt2()
    with watched(model, None, log_every=1) as monitor:
        train(model, monitor, optimizer_of(model), batches(3))
    (said,) = warnings_of(caplog)
    assert said.startswith("stabmon was given no optimizer: learning rates")
    assert said.endswith("give optimizer=...")


def test_the_optimizer_of_another_model_is_named(caplog):
    model = gpt2()
    optimizer = optimizer_of(copy.deepcopy(model))
    with watched(model, optimizer, log_every=1) as monitor:
        train(model, monitor, optimizer_of(model), batches(3))
    (said,) = warnings_of(caplog)
    assert "an optimizer of another model: none of its 28 parameters is one of" in said


def halves(model):
    """Optimizers over both halves of the model, and one over another model."""
    parameters = list(model.parameters())
    return [
        torch.optim.SGD(parameters[:9], 0.1),
        {"other": torch.optim.SGD(gpt2().parameters(), 0.1)},
    ]


def masters(model):
    model.to(torch.bfloat16)
    copies = [each.detach().float().requires_grad_() for each in model.parameters()]
    return torch.optim.SGD(copies, 0.1)


def flattened(model):
    flat = torch.cat([each.detach().flatten() for each in model.parameters()])
    return torch.optim.SGD([flat.requires_grad_()], 0.1)


@pytest.mark.parametrize("make", [halves, masters, flattened])
def test_several_optimizers_master_weights_and_flattened_ones_are_in_order(make, caplog):
    model = gpt2()
    with watched(model, make(model), log_every=1) as monitor:
        train(model, monitor, optimizer_of(model), batches(2))
    assert not [each for each in warnings_of(caplog) if "another model" in each]


def test_use_after_close_is_said_once_and_does_nothing(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watched(model, optimizer, log_every=1)
    train(model, monitor, optimizer, batches(1))
    monitor.close()
    assert train(model, monitor, optimizer, batches(3)) == [None] * 3
    (said,) = warnings_of(caplog)
    assert said.startswith("stabmon's monitor is closed and measures nothing any more")
    assert monitor.step == 1
    assert clean(model)


def test_applying_nothing_does_nothing(caplog):
    model = gpt2()
    optimizer = optimizer_of(model)
    with watched(model, optimizer, log_every=1) as monitor:
        (diagnosis,) = train(model, monitor, optimizer, batches(1))
        assert monitor.apply(monitor.get_intervention(diagnosis)) is None
        assert monitor.apply(None, hold=False) is None
    assert monitor.applied == ()
    assert warnings_of(caplog) == []
    assert not monitor.errors
