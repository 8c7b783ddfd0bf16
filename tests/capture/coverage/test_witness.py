"""Attention that no adapter records is named, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stabmon
from stabmon.capture import AttentionCapture
from stabmon.capture.coverage.witness import is_due

BATCH, LENGTH, HEADS, DIM = 2, 6, 3, 4
WIDTH = HEADS * DIM
Core = Callable[[Tensor, Tensor, Tensor], Tensor]


class Layer(nn.Module):
    """Self-attention with a given core, which takes and returns ``[B, H, L, D]``."""

    def __init__(self, core: Core) -> None:
        super().__init__()
        self.qkv, self.out, self.core = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH), core

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).view(BATCH, -1, 3, HEADS, DIM).permute(2, 0, 3, 1, 4).unbind(0)
        return x + self.out(self.core(q, k, v).transpose(1, 2).flatten(2))


def plain(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return (q @ k.mT).softmax(-1) @ v


def over_slots(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by a softmax over queries, normalised over keys again, as slot attention does."""
    weights = (q @ k.mT).softmax(-2)
    return (weights / weights.sum(-1, keepdim=True)) @ v


def packed(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Attend by scores picked into one list and laid out again, which loses their axes."""
    scores = q @ k.mT
    return scores[torch.ones_like(scores, dtype=torch.bool)].view(scores.shape).softmax(-1) @ v


class Opaque(torch.autograd.Function):
    """A kernel of another package, by the name that such kernels have."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(v)
        return torch.from_numpy(v.detach().numpy() * 2.0)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, ...]:
        return (gradients[0],) * 3


class FlashAttnFunc(Opaque):
    pass


class HiddenSoftmax(Opaque):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return packed(q, k, v)


class Tower(nn.Module):
    """Layers one after the other."""

    def __init__(self, *cores: Core) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList([Layer(core) for core in cores])

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def batch() -> Tensor:
    return torch.randn(BATCH, LENGTH, WIDTH, generator=torch.Generator().manual_seed(1))


def unseen(model: nn.Module, x: Tensor | None = None, *, gradients: bool = True) -> dict[str, str]:
    """Return the attention of one forward that the witness reports as not seen."""
    capture = AttentionCapture(model, lambda call: None, on_error=pytest.fail)
    with torch.set_grad_enabled(gradients), capture:
        capture.witness.end(model(batch() if x is None else x))
    return capture.witness.unseen


@pytest.mark.parametrize("gradients", [True, False])
@pytest.mark.parametrize("core", [over_slots, packed])
def test_a_layer_that_is_not_seen_is_named_beside_one_that_is(core: Core, gradients: bool) -> None:
    assert unseen(Tower(plain, core), gradients=gradients) == {"layers.1": "a softmax of a product"}


def test_attention_that_is_seen_is_not_named() -> None:
    fused = F.scaled_dot_product_attention
    assert unseen(Tower(plain, fused)) == {}
    assert unseen(nn.TransformerEncoderLayer(WIDTH, HEADS, 16, batch_first=True)) == {}


def test_kernels_and_custom_functions_are_named_by_the_graph_that_autograd_keeps() -> None:
    assert unseen(Tower(plain, FlashAttnFunc.apply)) == {"layers.1": "a kernel flashattnfunc"}
    assert unseen(Tower(plain, HiddenSoftmax.apply)) == {"layers.1": "a softmax of a product"}


def test_a_scripted_layer_is_named_with_and_without_gradients() -> None:
    class Scripted(nn.Module):
        def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
            return torch.matmul(torch.softmax(torch.matmul(q, k.transpose(-1, -2)), -1), v)

    model = Tower(plain, plain)
    model.layers[1].core = torch.jit.script(Scripted())
    for gradients in (True, False):
        found = unseen(model, gradients=gradients)
        assert len(found) == 1
        assert next(iter(found)).startswith("layers.1")


def test_a_layer_that_runs_in_another_thread_is_named() -> None:
    model = Tower(plain, plain)
    with ThreadPoolExecutor(1) as pool:
        first = model.layers[0].forward
        model.layers[0].forward = lambda x: pool.submit(first, x).result()
        assert unseen(model) == {"layers.0": "a softmax of a product"}


def test_a_model_that_runs_in_another_thread_is_said_to() -> None:
    with ThreadPoolExecutor(1) as pool:
        model = Tower(plain)
        with stabmon.AttentionAnalyzer(model) as analyzer:
            pool.submit(model, batch()).result()
        with pytest.raises(RuntimeError, match="another thread"):
            analyzer.diagnose()


class NoAttention(nn.Module):
    """Model with every kind of softmax that is no attention."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.router, self.experts = nn.Linear(WIDTH, 4), nn.Parameter(torch.randn(4, WIDTH, WIDTH))
        self.codes, self.classes = nn.Parameter(torch.randn(7, WIDTH)), nn.Linear(WIDTH, 5)
        self.image, self.text = nn.Linear(WIDTH, DIM), nn.Linear(WIDTH, DIM)

    def forward(self, x: Tensor) -> Tensor:
        gate = (self.router(x) / 0.7).softmax(-1)
        mixed = torch.einsum("ble,blei->bli", gate, torch.einsum("bld,edi->blei", x, self.experts))
        top, index = gate.topk(2)
        sparse = (
            top.unsqueeze(-1)
            * torch.gather(
                torch.einsum("bld,edi->blei", x, self.experts),
                2,
                index[..., None].expand(-1, -1, -1, WIDTH),
            )
        ).sum(2)
        quantised = (x @ self.codes.mT).softmax(-1) @ self.codes
        sure = self.classes(x).softmax(-1).amax(-1, keepdim=True)
        similarity = self.image(x).mean(1) @ self.text(x).mean(1).mT
        contrast = (
            F.cross_entropy(similarity, torch.arange(BATCH))
            - (similarity.detach().softmax(-1) * similarity.log_softmax(-1)).sum()
        )
        rates = (x * torch.rand(WIDTH)).exp() / x.exp().sum(-1, keepdim=True)
        return (mixed + sparse + quantised) * sure * rates + contrast


def test_routers_gates_codebooks_classifiers_and_losses_are_not_named() -> None:
    assert unseen(NoAttention()) == {}
    assert unseen(NoAttention(), gradients=False) == {}


def test_a_teacher_beside_the_model_and_what_came_before_it_are_not_named() -> None:
    class Student(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model, self.teacher = Tower(plain), [Tower(packed)]

        def forward(self, x: Tensor) -> Tensor:
            return self.model(x) - self.teacher[0](x)

    assert unseen(Student()) == {}
    assert unseen(Tower(plain), Tower(packed)(batch())) == {}


def test_a_layer_made_during_the_forward_is_seen() -> None:
    class Lazy(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if not hasattr(self, "layer"):
                self.layer = Layer(plain)
            return self.layer(x)

    layers: list[str] = []
    model = Lazy()
    with AttentionCapture(model, lambda call: layers.append(call.layer)) as capture:
        model(batch())
        model(batch())
    assert layers == ["layer", "layer"]
    assert capture.witness.unseen == {}


def test_the_first_two_openings_are_witnessed_and_then_ever_fewer() -> None:
    assert [n for n in range(1, 600) if is_due(n)] == [1, 2, 16, 32, 256, 512]
