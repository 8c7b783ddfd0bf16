"""Compiled models: seen through a shadow forward, with no graph more and no bit changed."""

import copy
import gc
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from stabmon.capture import AttentionCapture, compiled_modules
from stabmon.records import AttentionCall
from tests.support.attention_zoo import (
    BATCH,
    HEADS,
    LENGTH,
    WIDTH,
    Attention,
    Tower,
    gpt2,
    noise,
    seeded,
    zoo,
)
from tests.support.sweeps import sweep


@pytest.fixture(autouse=True)
def fresh_compiler() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def counter(backend: str = "aot_eager") -> Any:
    return CompileCounterWithBackend(backend)


class Noisy(nn.Module):
    """A tower with dropout, a running mean, a counter, and a draw from Python's generator."""

    def __init__(self, how: str = "fused") -> None:
        super().__init__()
        self.tower, self.dropout, self.norm = (
            Tower(lambda: Attention(how)),
            nn.Dropout(0.2),
            nn.BatchNorm1d(LENGTH),
        )
        self.forwards = 0

    def forward(self, x: Tensor) -> Tensor:
        self.last = x
        y: Tensor = self.tower(self.dropout(self.norm(x)))
        return y


def wrapped(model: nn.Module, backend: Any) -> Callable[..., Any]:
    return torch.compile(model, backend=backend)


def in_place(model: nn.Module, backend: Any) -> Callable[..., Any]:
    model.compile(backend=backend)
    return model


def by_layer(model: nn.Module, backend: Any) -> Callable[..., Any]:
    for block in model.tower.blocks:
        block.compile(backend=backend)
    return model


def layers_wrapped(model: nn.Module, backend: Any) -> Callable[..., Any]:
    model.tower.blocks = nn.ModuleList(
        torch.compile(block, backend=backend) for block in model.tower.blocks
    )
    return model


def forward_alone(model: nn.Module, backend: Any) -> Callable[..., Any]:
    model.forward = torch.compile(model.forward, backend=backend)
    return model


def twice(model: nn.Module, backend: Any) -> Callable[..., Any]:
    by_layer(model, backend)
    return torch.compile(model, backend=backend)


WAYS = [wrapped, in_place, by_layer, layers_wrapped, forward_alone, twice]


def train(
    model: nn.Module, call: Callable[..., Any], *, watched: bool, steps: int = 4, look: Any = None
) -> list[Tensor]:
    torch.manual_seed(0)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6)
    capture = AttentionCapture(model, look or (lambda _: None))
    kept = []
    for step in range(steps):
        x = noise(BATCH, LENGTH, WIDTH, seed=step)
        if watched and step % 2:
            with capture:
                loss = call(x).square().mean()
        else:
            loss = call(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        assert loss.isfinite()
        kept += [loss.detach(), *(b.clone() for b in model.buffers())]
    return [*kept, *(p.detach().clone() for p in model.parameters()), torch.rand(2)]


@pytest.mark.parametrize("compile_it", sweep(WAYS, keep=2))
def test_a_compiled_model_is_seen_trains_to_the_same_bits_and_compiles_no_more(
    compile_it: Any,
) -> None:
    model = seeded(Noisy)
    twin = copy.deepcopy(model)
    plain, watched = counter(), counter()
    expected = train(twin, compile_it(twin, plain), watched=False)
    torch._dynamo.reset()
    seen: list[str] = []
    found = train(
        model, compile_it(model, watched), watched=True, look=lambda call: seen.append(call.layer)
    )
    assert seen == ["tower.blocks.0", "tower.blocks.1"] * 2
    assert watched.frame_count == plain.frame_count > 0
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


@pytest.mark.long
def test_a_model_compiled_by_inductor_is_seen_and_trains_to_the_same_bits() -> None:
    model = seeded(Noisy)
    twin = copy.deepcopy(model)
    expected = train(twin, torch.compile(twin), watched=False)
    torch._dynamo.reset()
    seen: list[AttentionCall] = []
    found = train(model, torch.compile(model), watched=True, look=seen.append)
    assert len(seen) == 4
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def test_a_first_opening_before_anything_was_compiled_changes_nothing() -> None:
    model = seeded(Noisy)
    backend = counter()
    call = torch.compile(model, backend=backend)
    for _ in range(2):
        with AttentionCapture(model, lambda _: None) as capture:
            call(noise(BATCH, LENGTH, WIDTH)).sum().backward()
        assert capture.calls == {"sdpa": 2}
    assert backend.frame_count == 1


def test_a_shadow_shows_the_batch_of_the_real_forward() -> None:
    model = seeded(lambda: Tower(lambda: Attention("fused")))
    calls: list[AttentionCall] = []
    x = noise(BATCH, LENGTH, WIDTH)
    with AttentionCapture(model, calls.append):
        model(x)
        torch.compile(model, backend="eager")(x)
    for own, shadow in zip(calls[:2], calls[2:], strict=True):
        assert own.layer == shadow.layer
        assert torch.equal(own.query, shadow.query)
        assert not shadow.query.requires_grad


@pytest.mark.parametrize("name", ["gpt2-sdpa", "bloom"])
def test_a_compiled_transformers_model_is_seen_without_a_graph_more(name: str) -> None:
    model, inputs = zoo()[name]()
    backend = counter("eager")
    compiled = torch.compile(model, backend=backend)
    counts = []
    for step in range(4):
        if step % 2:
            with AttentionCapture(model, lambda _: None) as capture:
                compiled(**inputs).logits.sum().backward()
            assert sum(capture.calls.values()) == 2
            assert capture.unseen == 0
        else:
            compiled(**inputs).logits.sum().backward()
        counts.append(backend.frame_count)
    assert counts == [counts[0]] * 4


def test_a_shadow_undoes_what_modules_set_buffers_hold_and_generators_drew() -> None:
    class Stateful(Attention):
        def __init__(self) -> None:
            super().__init__("fused")
            self.register_buffer("mean", torch.zeros(3))
            self.forwards = 0

        def forward(self, x: Tensor) -> Tensor:
            self.forwards += 1
            self.mean += 1
            self.drawn = random.random() + torch.rand(()).item()
            return super().forward(x)

    model = seeded(Stateful)
    counts: list[int] = []
    model.compile(backend=lambda graph, _: graph.forward)
    with AttentionCapture(model, lambda call: counts.append(call.module.forwards)):
        torch.manual_seed(0)
        random.seed(0)
        model(noise(BATCH, LENGTH, WIDTH))
    assert counts == [1]
    assert model.forwards == 1
    assert model.mean.tolist() == [1, 1, 1]
    torch.manual_seed(0)
    random.seed(0)
    assert model.drawn == random.random() + torch.rand(()).item()


def test_weights_cast_in_a_shadow_still_get_their_gradients() -> None:
    model = seeded(lambda: Tower(lambda: Attention("fused")))
    compiled = torch.compile(model, backend="eager")
    x = noise(BATCH, LENGTH, WIDTH)
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            if watched:
                with AttentionCapture(model, lambda call: None):
                    loss = compiled(x).square().mean()
            else:
                loss = compiled(x).square().mean()
        loss.backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_a_compiled_model_without_gradients_runs_no_shadow_and_counts_as_unseen() -> None:
    model = seeded(lambda: Tower(lambda: Attention("fused")))
    compiled = torch.compile(model, backend="eager")
    with AttentionCapture(model, print) as capture, torch.no_grad():
        compiled(noise(BATCH, LENGTH, WIDTH))
    assert capture.calls == {}
    assert capture.unseen == 1


def test_a_failing_shadow_is_reported_and_the_compiled_call_is_made() -> None:
    class Touchy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not torch.compiler.is_compiling():
                raise ValueError("not without a compiler")
            return F.scaled_dot_product_attention(x, x, x)

    errors: list[Exception] = []
    model = Touchy()
    x = noise(1, 2, 3, 4).requires_grad_()
    with AttentionCapture(model, print, on_error=errors.append):
        assert torch.compile(model, backend="eager")(x).shape == x.shape
    assert [str(error) for error in errors] == ["not without a compiler"]


def test_a_compiled_training_step_is_counted_as_unseen_and_compiles_no_more() -> None:
    model, inputs = gpt2("sdpa")
    backend = counter("eager")
    step = torch.compile(lambda ids: model(ids).logits.square().mean(), backend=backend)
    step(inputs["input_ids"])
    graphs = backend.frame_count
    with AttentionCapture(model, print) as capture:
        step(inputs["input_ids"]).backward()
    assert capture.calls == {}
    assert capture.unseen == 1
    assert backend.frame_count == graphs


def test_a_compiled_function_within_a_model_compiles_no_more() -> None:
    backend = counter("eager")

    class Rotating(Attention):
        rotate = staticmethod(torch.compile(lambda x: x.cos() + F.softmax(x, -1), backend=backend))

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(self.rotate(x))

    model = seeded(lambda: Rotating("manual"))
    for _ in range(3):
        model(noise(BATCH, LENGTH, WIDTH))
        with AttentionCapture(model, lambda _: None) as capture:
            model(noise(BATCH, LENGTH, WIDTH))
        assert capture.calls == {"softmax": 1}
    assert backend.frame_count == 1


def test_compiled_flex_attention_is_seen_and_compiles_no_more() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    backend = counter("eager")
    compiled = torch.compile(flex_attention, backend=backend)
    blocks = create_block_mask(
        lambda b, h, i, j: (i >= j) & (i - j < 4), None, None, LENGTH, LENGTH, device="cpu"
    )

    class Flexible(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2)
            y: Tensor = compiled(
                q, q[:, :2], q[:, :2], block_mask=blocks, enable_gqa=True, scale=0.3
            )
            return y

    model = Flexible()
    calls: list[AttentionCall] = []
    with torch.no_grad():
        for watched in (False, True, False, True):
            if watched:
                with AttentionCapture(model, calls.append) as capture:
                    model(noise(BATCH, LENGTH, WIDTH))
                assert capture.calls == {"flex": 1}
            else:
                model(noise(BATCH, LENGTH, WIDTH))
            graphs = backend.frame_count
    assert backend.frame_count == graphs == 1
    age = torch.arange(LENGTH)[:, None] - torch.arange(LENGTH)
    assert calls[0].scale == 0.3
    assert calls[0].key.shape[1] == 2
    assert torch.equal(calls[0].mask[0, 0], (age >= 0) & (age < 4))


def test_a_flex_mask_that_looks_up_documents_is_written_out() -> None:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    documents = torch.tensor([[0] * 5 + [1] * 7, [0] * 9 + [1] * 3])
    blocks = create_block_mask(
        lambda b, h, i, j: (i >= j) & (documents[b, i] == documents[b, j]),
        BATCH,
        None,
        LENGTH,
        LENGTH,
        device="cpu",
    )

    class Packed(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            q = x.view(BATCH, LENGTH, HEADS, -1).transpose(1, 2)
            y: Tensor = flex_attention(q, q, q, block_mask=blocks)
            return y

    calls: list[AttentionCall] = []
    with torch.no_grad(), AttentionCapture(Packed(), calls.append) as capture:
        capture.model(noise(BATCH, LENGTH, WIDTH))
    same = documents[:, None, :, None] == documents[:, None, None, :]
    assert torch.equal(calls[0].mask, same & torch.ones(LENGTH, LENGTH, dtype=torch.bool).tril())


def test_compiled_modules_are_found_within_and_around_a_model() -> None:
    model = seeded(lambda: Tower(lambda: Attention("fused")))
    assert compiled_modules(model) == []
    around = torch.compile(model, backend="eager")
    model.blocks[0].compile(backend="eager")
    model.blocks[1] = torch.compile(model.blocks[1], backend="eager")
    assert compiled_modules(model) == [around, model.blocks[0], model.blocks[1]]
    other = torch.compile(nn.Linear(1, 1), backend="eager")
    assert other not in compiled_modules(model)
    del around, other
    gc.collect()
