"""A loop of one's own under Accelerate."""

import pytest
import torch
from accelerate import Accelerator
from torch.nn import functional

from stabmon import AttentionStabilityMonitor
from tests.support.small_runs import batches, clean, gpt2, optimizer_of, same_bits, weights


def run(watched):
    """Accumulates two micro-batches a step and clips by Accelerate; gives weights, norms before
    clipping, and norms read.
    """
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    plain = gpt2(dropout=0.1)
    model, optimizer = accelerator.prepare(plain, optimizer_of(plain))
    monitor = (
        AttentionStabilityMonitor(model, optimizer, log_every=2, schedule="fixed", sinks=[])
        if watched
        else None
    )
    torch.manual_seed(0)
    before, read = [], []
    for tokens in batches(8):
        with accelerator.accumulate(model):
            logits = model(input_ids=tokens, labels=tokens).logits
            accelerator.backward(functional.cross_entropy(logits.flatten(0, 1), tokens.flatten()))
            if accelerator.sync_gradients:
                before.append(accelerator.clip_grad_norm_(model.parameters(), 1e-3).item())
            optimizer.step()
            optimizer.zero_grad()
            if accelerator.sync_gradients and monitor and (diagnosis := monitor.on_step()):
                read += [
                    each.gradients[""] for each in diagnosis.readings[-1:] if each.sampled
                ]  # else it is of the rate
    if monitor:
        monitor.close()
        assert not monitor.errors
    assert clean(model)
    return weights(plain), before, read


def test_gradient_norms_are_those_before_accelerate_clips_and_training_is_the_same():
    plain, _, _ = run(watched=False)
    watched, before, read = run(watched=True)
    assert read == pytest.approx(before[1::2], rel=1e-5)
    assert same_bits(plain, watched)
