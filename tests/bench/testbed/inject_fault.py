"""Make a run go wrong for real. Each touches weights, rates, data or gradients, and never a number
that is measured.

A provocation is told of four marks of a step, of which it uses what it needs. Steps are counted
from 1; ``start=0`` is before the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from provoke import query_key_weights
from torch import Tensor, nn

from testbed.models import attention_modules


class Provocation:
    """Does nothing."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def batch(self, step: int, tokens: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        """The batch to learn from; ``other`` is one of another text."""
        return tokens

    def rate_factor(self, step: int) -> float:
        """What the learning rate is multiplied by."""
        return 1.0

    def before_step(self, step: int) -> None:
        """Gradients are ready."""

    def after_step(self, step: int) -> None:
        """The optimizer has stepped; called with 0 before the first step."""


class Scale(Provocation):
    """Parameters times ``factor`` after each of the steps ``start … start + steps - 1``."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        part: str,
        factor: float,
        start: int,
        steps: int,
    ) -> None:
        super().__init__(model, optimizer)
        self.factor, self.start, self.steps = factor, start, steps
        self.parameters = list(self.chosen(part))

    def chosen(self, part: str) -> Iterable[Tensor]:
        """The parameters of the embedding, or of the first MLP's last layer."""
        named = dict(self.model.named_parameters())
        if part == "embedding":
            return [next(p for name, p in named.items() if "emb" in name or "wte" in name)]
        modules = dict(self.model.named_modules())
        mlp = next(m for name, m in modules.items() if name.endswith("mlp"))
        return [
            list(mlp.parameters())[-1]
            if list(mlp.parameters())[-1].ndim > 1
            else list(mlp.parameters())[-2]
        ]

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if self.start <= step < self.start + self.steps:
            for parameter in self.parameters:
                parameter.mul_(self.factor)


class ScaleQueryKey(Scale):
    """The same for W_q and W_k of some layers, or of all."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        factor: float,
        start: int,
        steps: int,
        layers: list[int] | None,
    ) -> None:
        self.layers = layers
        super().__init__(model, optimizer, part="", factor=factor, start=start, steps=steps)

    def chosen(self, part: str) -> Iterable[Tensor]:
        layers = query_key_weights(self.model)
        return [
            p
            for at, parts in enumerate(layers)
            if self.layers is None or at in self.layers
            for p in parts
        ]


class QueryKeyRate(Provocation):
    """From ``start`` on the steps of W_q and W_k are ``factor`` times as large."""

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, factor: float, start: int
    ) -> None:
        super().__init__(model, optimizer)
        self.factor, self.start = factor, start
        self.parameters = [p for parts in query_key_weights(model) for p in parts]
        self.before: list[Tensor] = []

    def before_step(self, step: int) -> None:
        self.before = [p.detach().clone() for p in self.parameters] if step >= self.start else []

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        for parameter, before in zip(self.parameters, self.before, strict=False):
            parameter.copy_(before + self.factor * (parameter - before))
        self.before = []


class Rate(Provocation):
    """The learning rate times ``factor`` for ``steps`` steps, reached within ``over`` steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        factor: float,
        start: int,
        over: int,
        steps: int,
    ) -> None:
        super().__init__(model, optimizer)
        self.factor, self.start, self.over, self.steps = factor, start, over, steps

    def rate_factor(self, step: int) -> float:
        if not self.start <= step < self.start + self.steps:
            return 1.0
        return math.exp(math.log(self.factor) * min(1.0, (step - self.start + 1) / self.over))


class Temperature(Provocation):
    """The scale of the scores times ``factor`` after each of ``steps`` steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        factor: float,
        start: int,
        steps: int,
    ) -> None:
        super().__init__(model, optimizer)
        self.factor, self.start, self.steps = factor, start, steps

    def after_step(self, step: int) -> None:
        if self.start <= step < self.start + self.steps:
            for _, module in attention_modules(self.model):
                module.scaling *= self.factor


class SharedDrift(Provocation):
    """From ``start`` on the biases of queries and keys grow along one direction a head: all scores
    of a row grow alike.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, factor: float, start: int
    ) -> None:
        super().__init__(model, optimizer)
        self.factor, self.start = factor, start

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        if step < self.start:
            return
        for _, module in attention_modules(self.model):
            groups = module.q_proj.out_features // module.k_proj.out_features
            size = module.head_dim
            if step == self.start:  # give each head a direction of its own
                along = torch.randn(
                    module.k_proj.out_features // size,
                    size,
                    generator=torch.Generator().manual_seed(step),
                )
                along = along / along.norm(dim=-1, keepdim=True)
                module.k_proj.bias.copy_(along.flatten())
                module.q_proj.bias.copy_(along.repeat_interleave(groups, 0).flatten())
            module.k_proj.bias.mul_(self.factor)
            module.q_proj.bias.mul_(self.factor)


class Noise(Provocation):
    """A share of each batch becomes random bytes for ``steps`` steps."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        *,
        share: float,
        start: int,
        steps: int,
    ) -> None:
        super().__init__(model, optimizer)
        self.share, self.start, self.steps = share, start, steps

    def batch(self, step: int, tokens: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        if not self.start <= step < self.start + self.steps:
            return tokens
        rows = max(1, round(self.share * len(tokens)))
        noise = torch.randint(0, 256, (rows, tokens.shape[1]), generator=generator)
        return torch.cat([noise, tokens[rows:]])


class OtherText(Provocation):
    """Another text from ``start`` on, half of each batch."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, start: int) -> None:
        super().__init__(model, optimizer)
        self.start = start

    def batch(self, step: int, tokens: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        return (
            tokens
            if step < self.start
            else torch.cat([other[: len(other) // 2], tokens[len(tokens) // 2 :]])
        )


class InfiniteGradient(Provocation):
    """One step's gradient of one value projection overflows, as of a bad batch in a low
    precision.
    """

    def __init__(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, *, start: int, layer: int
    ) -> None:
        super().__init__(model, optimizer)
        self.start, self.layer = start, layer

    def before_step(self, step: int) -> None:
        if step == self.start:
            _, module = list(attention_modules(self.model))[self.layer]
            projection = getattr(module, "v_proj", None) or module.c_proj
            projection.weight.grad[0, 0] = torch.inf


PROVOCATIONS: dict[str, type[Provocation]] = {
    "none": Provocation,
    "scale": Scale,
    "scale_query_key": ScaleQueryKey,
    "query_key_rate": QueryKeyRate,
    "rate": Rate,
    "temperature": Temperature,
    "shared_drift": SharedDrift,
    "noise": Noise,
    "other_text": OtherText,
    "infinite_gradient": InfiniteGradient,
}
