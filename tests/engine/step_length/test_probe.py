"""The gain of a step on its own batch, against the closed form of a quadratic and against the loss
itself.
"""

import copy
import math

import pytest
import torch
from torch import nn

from stabmon._torch.forward_call import ForwardCall
from stabmon.engine.step_length.probe import StepProbe


class Quadratic(nn.Module):
    """A loss of curvature 2 a in every direction; the gain ratio of gradient descent at rate r is 1
    - r a.
    """

    def __init__(self):
        super().__init__()
        self.one, self.other = (
            nn.Parameter(torch.full((4, 3), 2.0)),
            nn.Parameter(torch.full((5,), -1.0)),
        )

    def forward(self, scale):
        return {"loss": scale * (self.one.square().sum() + self.other.square().sum())}


class Classifier(nn.Module):
    """Logits ``[B, S, 11]``; the loss is made outside."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.head, self.drop = nn.Embedding(11, 16), nn.Linear(16, 11), nn.Dropout(0.3)

    def forward(self, ids):
        return self.head(self.drop(self.embed(ids)))


def probed(model, args, loss_of, rate, *, clip=None, scale=1.0, groups=None):
    """The probe after one step of SGD, and the change of the loss that the same forward then
    shows.
    """
    probe = StepProbe(model)
    probe.begin(True)
    call = ForwardCall.of(model, args, {})
    output = model(*args)
    probe.follow(call, output)
    loss = loss_of(output)
    (loss * scale).backward()
    probe.backward_ended()
    for parameter in model.parameters():
        parameter.grad.div_(scale)
    if clip is not None:
        nn.utils.clip_grad_norm_(model.parameters(), clip)
    groups = groups or {"0.0": list(model.parameters())}
    probe.before(groups)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.sub_(rate * parameter.grad)
    probe.after(list(groups))
    with call.again(model) as forward:
        after = loss_of(forward())
    return probe, float(after.detach() - loss.detach()), float(loss.detach())


@pytest.mark.parametrize("rate", [0.01, 0.2, 0.5, 0.9, 1.5])
def test_the_gain_ratio_of_a_quadratic_is_that_of_the_formula(rate):
    probe, change, size = probed(
        Quadratic(), (torch.tensor(1.0),), lambda output: output["loss"], rate
    )
    found = probe.quality(1)
    assert found.gain_ratio == pytest.approx(1 - rate, abs=1e-5)
    assert found.rise == pytest.approx(change / size, abs=1e-6)


@pytest.mark.parametrize("ignored", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1024.0])
def test_a_cross_entropy_outside_of_the_model_is_found_also_scaled_clipped_and_with_dropout(
    scale, ignored
):
    ids = torch.randint(0, 11, (3, 7), generator=torch.Generator().manual_seed(1))
    labels = ids.clone()
    labels[:, :3] = -100 if ignored else labels[:, :3]

    def loss_of(logits):
        return nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten())

    probe, change, _ = probed(Classifier(), (ids,), loss_of, 3.0, clip=0.1, scale=scale)
    found, _ = probe._change()
    assert found == pytest.approx(scale * change, rel=1e-4)
    ratio = probe.quality(1).gain_ratio
    small, *_ = probed(Classifier(), (ids,), loss_of, 1e-3, clip=0.1, scale=scale)
    assert small.quality(1).gain_ratio == pytest.approx(1, abs=0.02)
    assert ratio < 1


def test_another_objective_outside_of_the_model_is_unknown():
    ids = torch.randint(0, 11, (3, 7))
    probe, *_ = probed(Classifier(), (ids,), lambda logits: logits.square().mean(), 0.1)
    assert probe.quality(1) is None


def test_the_factor_that_fits_is_found_and_leaves_every_bit_where_it_was():
    model = Quadratic()
    probe, *_ = probed(model, (torch.tensor(1.0),), lambda output: output["loss"], 4.0)
    bits = copy.deepcopy(model.state_dict())
    state = torch.get_rng_state()
    assert probe.fitting(0.6) == {
        "0.0": pytest.approx(0.1, rel=1e-3)
    }  # the rate 0.4 has the ratio 0.6
    assert all(torch.equal(bits[name], value) for name, value in model.state_dict().items())
    assert torch.equal(state, torch.get_rng_state())


def test_one_group_that_alone_is_too_long_is_told_alone():
    model = Quadratic()
    model.other = nn.Parameter(torch.full((5, 1), -1.0))
    groups = {"0.0": [model.one], "0.1": [model.other]}
    probe = StepProbe(model)
    probe.begin(True)
    call = ForwardCall.of(model, (torch.tensor(1.0),), {})
    output = model(torch.tensor(1.0))
    probe.follow(call, output)
    output["loss"].backward()
    probe.backward_ended()
    probe.before(groups)
    with torch.no_grad():
        model.one.sub_(8.0 * model.one.grad)
        model.other.sub_(0.1 * model.other.grad)
    probe.after(list(groups))
    assert probe.quality(1).gain_ratio < 0
    assert probe.fitting(0.6) == {"0.0": pytest.approx(0.05, rel=0.2)}
    put_back = probe.shorten({"0.0": 0.05})
    assert float(model.one.detach()[0, 0]) == pytest.approx(2 - 0.05 * 32)
    put_back()
    assert float(model.one.detach()[0, 0]) == pytest.approx(2 - 32)


def test_a_step_too_small_to_tell_gives_no_ratio():
    probe, *_ = probed(Quadratic(), (torch.tensor(1.0),), lambda output: output["loss"], 1e-9)
    assert math.isnan(probe.quality(1).gain_ratio)


def test_nothing_is_held_after_the_step():
    probe, *_ = probed(Quadratic(), (torch.tensor(1.0),), lambda output: output["loss"], 0.1)
    probe.end()
    assert probe.quality(2) is None
    assert not probe.active


def test_no_step_is_probed_where_somebody_s_hook_would_notice():
    model, seen = Classifier(), []
    model.head.register_forward_hook(lambda *_: seen.append(1))
    probe, *_ = probed(
        model,
        (torch.zeros(2, 3, dtype=torch.long),),
        lambda logits: logits.logsumexp(-1).mean(),
        0.1,
    )
    assert not probe.active
