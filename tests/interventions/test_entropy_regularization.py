"""Every parameter gets exactly the gradient of loss + coefficient * term, whatever the model."""

from __future__ import annotations

import logging
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from stabmon.capture import AttentionCapture
from stabmon.interventions import TrainingRun
from stabmon.interventions.entropy_regularization import EntropyRegularization, sampled_rows
from stabmon.operator import attention_operator
from stabmon.records import AttentionCall
from tests.support.attention_zoo import WIDTH, noise, tokens
from tests.support.intervention_runs import ZOO, first_layer, growth, loss_of, make_run, run_of


class Explicit(nn.Module):
    """Causal attention that keeps its query and key, to write the term down by hand."""

    def __init__(self, grouped: bool = False) -> None:
        super().__init__()
        self.q, self.k, self.v = (
            nn.Linear(WIDTH, WIDTH),
            nn.Linear(WIDTH, WIDTH // 2 if grouped else WIDTH),
            nn.Linear(WIDTH, WIDTH),
        )
        self.grouped = grouped
        self.kept: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        q = self.q(x).unflatten(-1, (4, 8)).transpose(1, 2)
        k = self.k(x).unflatten(-1, (-1, 8)).transpose(1, 2)
        v = self.v(x).unflatten(-1, (4, 8)).transpose(1, 2)
        self.kept = q, k
        y = nn.functional.scaled_dot_product_attention(
            q, k, v[:, :2] if self.grouped else v, is_causal=True, enable_gqa=self.grouped
        )
        return y.transpose(1, 2).flatten(-2)


class Outer(nn.Module):
    def __init__(self, grouped: bool) -> None:
        super().__init__()
        self.attention = Explicit(grouped)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x)


def by_hand(model: nn.Module, heads: list[int], floor: float) -> Tensor:
    """The term from probabilities written out, over all rows with at least 16 keys."""
    q, k = model.attention.kept
    scores = q @ k.repeat_interleave(4 // k.shape[1], dim=1).mT * 8**-0.5
    p = scores.masked_fill(torch.ones(scores.shape[-2:]).triu(1).bool(), -torch.inf).softmax(-1)
    n = torch.arange(1, p.shape[-1] + 1)
    total = torch.zeros(())
    for head in heads:
        entropy = -torch.special.xlogy(p[:, head], p[:, head].clamp(min=1e-30)).sum(-1)
        total = total + (floor - entropy[:, 15:] / n[15:].log()).clamp(min=0).mean()
    return total


@pytest.mark.parametrize("grouped", [False, True])
def test_gradients_are_those_of_loss_and_term_written_by_hand(grouped: bool) -> None:
    torch.manual_seed(0)
    model, x = Outer(grouped), noise(2, 24, WIDTH) * 3
    run = make_run(model, {"x": x}, torch.optim.SGD)
    act = EntropyRegularization(coefficient=0.7, floor=0.9, rows=64).aimed_at(
        [growth("attention", 1), growth("attention", 2)]
    )
    loss = model(x).square().mean()
    term = by_hand(model, [1, 2], 0.9)
    assert term > 0.01
    expected = torch.autograd.grad(
        loss + 0.7 * term, [*model.attention.q.parameters(), *model.attention.k.parameters()]
    )
    act.apply(run)
    with AttentionCapture(model, lambda call: run.step_hooks.fire("attention", call)):
        loss = model(x).square().mean()
    loss.backward()
    found = [p.grad for p in [*model.attention.q.parameters(), *model.attention.k.parameters()]]
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


NAMES = [
    "gpt2-sdpa",
    "llama-sdpa",
    "qwen3-sdpa",
    "gemma2-eager",
    "bert-sdpa",
    "t5-sdpa",
    "gpt_neox-sdpa",
    "multihead-fused",
    "hand_written-manual",
    "hand_written-folded",
    "hand_written-softcap",
    "transformer_encoder",
]


@pytest.mark.parametrize("name", NAMES)
def test_in_models_as_they_are_the_gradient_is_the_slope_of_loss_plus_term(name: str) -> None:
    """Along a random direction, against a difference quotient of loss + coefficient * term in
    float64.
    """
    model, inputs = ZOO[name]()
    if "input_ids" in inputs:
        inputs = {**inputs, **tokens(24)}
        inputs.pop("attention_mask", None)
    else:
        inputs = {n: noise(2, 24, WIDTH) for n in inputs if n in ("x", "src")}
    model = model.double()
    inputs = {n: v.double() if v.is_floating_point() else v for n, v in inputs.items()}
    run = make_run(model, inputs, torch.optim.SGD)
    layer, act = list(run.layers)[-1], EntropyRegularization(coefficient=2.0, floor=1.0, rows=64)
    torch.manual_seed(1)
    directions = [torch.randn_like(p) * p.abs().mean() for p in model.parameters()]

    def value(shift: float) -> float:
        terms: list[Tensor] = []
        with torch.no_grad():
            for p, d in zip(model.parameters(), directions, strict=True):
                p.add_(d, alpha=shift)
            with AttentionCapture(
                model, lambda call: terms.append(term_of(call)) if call.layer == layer else None
            ):
                loss = loss_of(model, inputs)
            for p, d in zip(model.parameters(), directions, strict=True):
                p.sub_(d, alpha=shift)
        return float(loss + 2.0 * terms[0])

    slope = (value(1e-5) - value(-1e-5)) / 2e-5
    without = gradient_along(run, inputs, directions)
    act.apply(run, growth(layer, 1))
    found = gradient_along(run, inputs, directions)
    assert abs(found - without) > 1e-4 * abs(slope), "the term has no say"
    assert found == pytest.approx(slope, rel=1e-3, abs=1e-5 * abs(found - without))


def gradient_along(run: TrainingRun, inputs: dict[str, Tensor], directions: list[Tensor]) -> float:
    run.model.zero_grad()
    with AttentionCapture(run.model, lambda call: run.step_hooks.fire("attention", call)):
        loss = loss_of(run.model, inputs)
    loss.backward()
    run.step_hooks.fire("on_step")
    return sum(
        (p.grad * d).sum().item()
        for p, d in zip(run.model.parameters(), directions, strict=True)
        if p.grad is not None
    )


def term_of(call: AttentionCall) -> Tensor:
    """The term of head 1 by the dense oracle."""
    assert call.query is not None
    assert call.key is not None
    dense = attention_operator(
        call.query,
        call.key,
        scale=call.scale,
        is_causal=call.is_causal,
        mask=call.mask,
        window=call.window,
        softcap=call.softcap,
        sinks=call.sinks,
        engine="dense",
    )
    entropy, n = dense.entropy()[:, 1], dense.n_visible().expand(*dense.entropy().shape)[:, 1]
    counts = n >= 16
    return (1.0 - entropy[counts] / n[counts].double().log()).clamp(min=0).mean()


def test_the_term_is_scaled_as_the_loss_is() -> None:
    class Scaler:
        def is_enabled(self) -> bool:
            return True

        def get_scale(self) -> float:
            return 1024.0

    def gradient(prepare: Callable[[TrainingRun], None], scale: float) -> Tensor:
        torch.manual_seed(0)
        model, x = Outer(False), noise(2, 24, WIDTH) * 3
        run = make_run(model, {"x": x}, torch.optim.SGD)
        prepare(run)
        EntropyRegularization(coefficient=0.7, floor=0.9).apply(run, growth("attention"))
        with AttentionCapture(model, lambda call: run.step_hooks.fire("attention", call)):
            loss = model(x).square().mean() * scale
        loss.backward()
        assert model.attention.q.weight.grad is not None
        return model.attention.q.weight.grad

    plain = gradient(lambda run: None, 1.0)
    torch.testing.assert_close(
        gradient(lambda run: setattr(run, "grad_scaler", Scaler()), 1024.0) / 1024, plain
    )
    torch.testing.assert_close(
        gradient(lambda run: setattr(run, "accumulation", 4), 0.25) * 4, plain
    )


def test_where_nothing_is_differentiated_it_says_so_once(caplog: pytest.LogCaptureFixture) -> None:
    run = run_of("gpt2-sdpa")
    EntropyRegularization().apply(run, growth(first_layer(run)))
    with caplog.at_level(logging.WARNING), torch.no_grad():
        for _ in range(2):
            with AttentionCapture(run.model, lambda call: run.step_hooks.fire("attention", call)):
                run.model(**run.inputs)
    assert caplog.text.count("does not reach") == 1


def test_rows_are_spread_over_the_sequence_and_never_drawn_from_the_global_generator() -> None:
    before = torch.get_rng_state()
    rows = sampled_rows(1000, 64, torch.Generator().manual_seed(3))
    assert torch.equal(before, torch.get_rng_state())
    assert len(rows) == 64
    assert all(i * 1000 // 64 <= int(row) <= (i + 1) * 1000 // 64 for i, row in enumerate(rows))
    assert sampled_rows(10, 64, torch.Generator()).tolist() == list(range(10))
