"""Every optimizer of a run is found, whatever holds it, and its groups keep their names."""

import accelerate
import pytest
import torch
from lightning.pytorch.core.optimizer import LightningOptimizer
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import Adafactor

from stabmon._torch.optimizer_adapter import OptimizerAdapter, innermost, read_once


def made(count=2):
    return [torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1 * (at + 1)) for at in range(count)]


class Container(torch.optim.Optimizer):
    """Steps several, as torchtitan's container does: an optimizer itself, whose groups nobody
    steps.
    """

    def __init__(self, optimizers):
        self.optimizers = optimizers
        super().__init__(
            [p for each in optimizers for group in each.param_groups for p in group["params"]],
            {"lr": 0.0},
        )


class Wrapper:
    """Holds one optimizer, and itself, and has a property that raises."""

    def __init__(self, optimizer):
        self.optimizer, self.base_optimizer = optimizer, self

    @property
    def chained_optimizers(self):
        raise RuntimeError("not yet")


WAYS = {
    "a list": lambda one, other: [one, other],
    "a mapping": lambda one, other: {"generator": one, "discriminator": other},
    "a container": lambda one, other: Container([one, other]),
    "wrappers in a tuple, one twice": lambda one, other: (
        Wrapper(one),
        Wrapper(Wrapper(other)),
        one,
    ),
    "accelerate": lambda one, other: [
        accelerate.Accelerator(cpu=True).prepare_optimizer(each) for each in (one, other)
    ],
    "lightning": lambda one, other: [LightningOptimizer(each) for each in (one, other)],
}


@pytest.mark.parametrize("way", WAYS)
def test_what_steps_the_parameters_is_found(way):
    optimizers = made()
    found = innermost(WAYS[way](*optimizers))
    assert len(found) == 2
    assert all(one is other for one, other in zip(found, optimizers, strict=True))
    view = OptimizerAdapter(WAYS[way](*optimizers))
    assert view.learning_rates() == {"0.0": 0.1, "1.0": 0.2}


class Anything:
    """Answers to every name with another of its kind."""

    def __getattr__(self, name):
        return Anything()


def test_an_object_that_answers_to_every_name_is_not_followed_for_ever():
    assert (
        OptimizerAdapter(
            Anything(), grad_scaler=torch.amp.GradScaler("cpu", enabled=False)
        ).learning_rates()
        == {}
    )


def test_no_optimizer_has_no_rates():
    assert OptimizerAdapter(None).learning_rates() == OptimizerAdapter([]).learning_rates() == {}


def test_a_rate_is_read_from_a_tensor_and_one_that_the_optimizer_makes_itself_is_left_out():
    weight, bias = nn.Linear(2, 2).parameters()
    optimizer = torch.optim.Adam([weight], lr=torch.tensor(0.5))
    assert OptimizerAdapter(
        [Adafactor([bias], relative_step=True), optimizer]
    ).learning_rates() == {"1.0": 0.5}


def test_a_report_that_raises_is_told_and_the_step_is_made():
    optimizer, errors = made()[0], []
    view = OptimizerAdapter(optimizer)
    view.before_step(lambda stepping: 1 / 0, errors.append)
    optimizer.step()
    view.close()
    assert [type(error) for error in errors] == [ZeroDivisionError]


def test_each_optimizer_reports_its_own_steps_until_it_is_closed():
    optimizers, told = made(), []
    view = OptimizerAdapter(optimizers)
    view.before_step(told.append, pytest.fail)
    view.before_step(told.append, pytest.fail)
    for each in optimizers:
        each.step()
    assert [id(each) for each in told] == [id(each) for each in optimizers]
    view.close()
    optimizers[0].step()
    assert len(told) == 2
    assert not any(each._optimizer_step_pre_hooks for each in optimizers)


def test_rates_noted_before_the_step_are_those_of_the_step():
    (optimizer,) = made(1)
    view = OptimizerAdapter(optimizer)
    view.note_rates(None, lambda group: group.rate)
    optimizer.param_groups[0]["lr"] = 7.0
    assert view.learning_rates() == {"0.0": 0.1}
    view.start_step()
    assert view.learning_rates() == {"0.0": 7.0}


class Reads(TorchDispatchMode):
    """Counts how often a number is read from a tensor."""

    count = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.count += func is torch.ops.aten._local_scalar_dense.default
        return func(*args, **(kwargs or {}))


def test_a_rate_on_a_device_is_read_once_until_it_changes():
    rate = torch.tensor(0.5)
    with Reads() as reads:
        assert [read_once(rate) for _ in range(3)] == [0.5] * 3
        assert reads.count == 1
        rate.fill_(0.25)
        assert [read_once(rate) for _ in range(3)] == [0.25] * 3
        assert reads.count == 2
        assert read_once(rate.clone()) == 0.25
        assert reads.count == 3
