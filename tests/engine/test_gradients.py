"""The gradient norms of a reading against a spy that looks at the gradients right before they are
clipped.
"""

import math

import pytest
import torch
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

from stabmon import AttentionStabilityMonitor
from tests.support.small_runs import BATCH, LENGTH, Attention, Floats, batches, clean, gpt2

TOKENS = batches(1)[0]
INPUTS = torch.randn(BATCH, LENGTH, 32, generator=torch.Generator().manual_seed(2))


def norm_of(parameters):
    """L2 norm of the gradients as they are, in float64."""
    return math.sqrt(
        sum(
            float(each.grad.double().square().sum()) for each in parameters if each.grad is not None
        )
    )


def clip(model):
    """Clip hard, and give the norm right before."""
    seen = norm_of(model.parameters())
    nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    return seen


def own_loss_of_logits(model):
    logits = model(input_ids=TOKENS, labels=TOKENS).logits
    functional.cross_entropy(logits.flatten(0, 1), TOKENS.flatten()).backward()


def loss_of_a_hidden_state_that_a_hook_has_kept(model):
    kept = []
    handle = model.transformer.h[0].register_forward_hook(lambda *given: kept.append(given[-1]))
    model(input_ids=TOKENS, labels=TOKENS)
    handle.remove()
    hidden = kept[0][0] if isinstance(kept[0], tuple) else kept[0]
    hidden.square().mean().backward()


def one_loss_of_two_forwards(model):
    first, second = (model(input_ids=tokens).logits.logsumexp(-1).mean() for tokens in batches(2))
    (first - 2 * second).square().backward()


def two_losses_of_one_forward(model):
    output = model(input_ids=TOKENS, labels=TOKENS)
    output.loss.backward(retain_graph=True)
    output.logits.square().mean().backward()


def accumulation_over_three_micro_batches(model):
    for tokens in batches(3):
        (model(input_ids=tokens).logits.square().mean() / 3).backward()


def reentrant_checkpoints(model):
    model.gradient_checkpointing_enable({"use_reentrant": True})
    model(input_ids=TOKENS, labels=TOKENS).logits.square().mean().backward()


def one_loss_and_a_penalty_on_the_weights(model):
    model(input_ids=TOKENS)
    sum(each.square().sum() for each in model.parameters()).backward()


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "backward",
    [
        own_loss_of_logits,
        loss_of_a_hidden_state_that_a_hook_has_kept,
        one_loss_of_two_forwards,
        two_losses_of_one_forward,
        accumulation_over_three_micro_batches,
        reentrant_checkpoints,
        one_loss_and_a_penalty_on_the_weights,
    ],
)
def test_norms_are_those_before_clipping_wherever_the_loss_comes_from(backward):
    model = gpt2()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        for _ in range(2):
            optimizer.zero_grad()
            backward(model)
            seen = clip(model)
            optimizer.step()
            reading = monitor.on_step().readings[-1]
            assert reading.gradients[""] == pytest.approx(seen, rel=1e-5)
        assert not monitor.errors
    assert clean(model)


def test_each_of_two_optimizers_may_clip_and_step_before_the_others_backward():
    model = Floats()
    parts = [
        [*model.first.parameters()],
        [*model.norm.parameters(), *model.second.parameters(), *model.head.parameters()],
    ]
    optimizers = [torch.optim.SGD(part, 0.1) for part in parts]
    with AttentionStabilityMonitor(model, optimizers[0], log_every=1, sinks=[]) as monitor:
        seen = []
        for part, optimizer in zip(parts, optimizers, strict=True):
            model.zero_grad()
            model(INPUTS).square().mean().backward(inputs=part)
            seen.append(norm_of(part))
            nn.utils.clip_grad_norm_(part, 1e-4)
            optimizer.step()
        reading = monitor.on_step().readings[-1]
    assert reading.gradients[""] == pytest.approx(math.hypot(*seen), rel=1e-5)
    assert reading.gradients["first"] == pytest.approx(seen[0], rel=1e-5)


def test_a_gradient_that_no_backward_has_made_or_left_is_not_told():
    def made_by_hand(model, optimizer):
        gradients = torch.autograd.grad(model(INPUTS).square().mean(), [*model.parameters()])
        for parameter, gradient in zip(model.parameters(), gradients, strict=True):
            parameter.grad = gradient
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)

    def taken_within_backward(model, _):
        def step(parameter):
            parameter.data.add_(parameter.grad, alpha=-0.1)
            parameter.grad = None

        handle = model.first.q.weight.register_post_accumulate_grad_hook(step)
        model(INPUTS).square().mean().backward()
        handle.remove()

    for backward in (made_by_hand, taken_within_backward):
        model = Floats()
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        with AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
            backward(model, optimizer)
            optimizer.step()
            assert dict(monitor.on_step().readings[-1].gradients) == {}
            assert not monitor.errors
        assert clean(model)


def test_a_backward_that_raises_spoils_no_later_one():
    model = Floats()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)

    def fail(_):
        raise RuntimeError("in backward")

    with AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        handle = model.first.q.weight.register_hook(fail)
        with pytest.raises(RuntimeError, match="in backward"):
            model(INPUTS).square().mean().backward()
        handle.remove()
        optimizer.zero_grad()
        model(INPUTS).square().mean().backward()
        seen = clip(model)
        optimizer.step()
        assert monitor.on_step().readings[-1].gradients[""] == pytest.approx(seen, rel=1e-5)


def test_half_precision_gradients_have_norms_of_single_precision():
    model = Attention().half()
    x = INPUTS[:2, :3].half()
    with AttentionStabilityMonitor(model, None, log_every=1, sinks=[]) as monitor:
        (model(x).float() * 5e3).sum().backward()
        seen = norm_of(model.parameters())
        reading = monitor.on_step().readings[-1]
    assert seen > torch.finfo(torch.float16).max
    assert reading.gradients[""] == pytest.approx(seen, rel=1e-3)


def test_checkpoints_around_the_whole_model_are_measured_at_their_end():
    model = Floats()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    with AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
        checkpoint(model, INPUTS, use_reentrant=False).square().mean().backward()
        seen = clip(model)
        optimizer.step()
        assert monitor.on_step().readings[-1].gradients[""] == pytest.approx(seen, rel=1e-5)
