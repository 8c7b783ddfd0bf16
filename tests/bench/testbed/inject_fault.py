"""Faults injected into real runs.

Each touches weights, rates, data or gradients, and never a measured number. A fault is called at
four points of a step and overrides those that it needs. Steps are counted from 1; ``start=0`` is
before the first.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from inject_fault import query_key_weights
from testbed.models import attention_modules
from torch import Tensor, nn


class Fault:
    """No fault."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        self.model, self.optimizer = model, optimizer

    def batch(self, step: int, tokens: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        """Return the batch to learn from; ``other`` is one of another text."""
        return tokens

    def rate_factor(self, step: int) -> float:
        """Return the factor of the learning rate."""
        return 1.0

    def before_step(self, step: int) -> None:
        """Called when gradients are ready."""

    def after_step(self, step: int) -> None:
        """Called after the optimizer's step, and with 0 before the first step."""


class Scale(Fault):
    """Parameters times ``factor`` after each step of an interval.

    The steps ``start … start + steps - 1``.
    """

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
        """Return the parameters of the embedding, or of the first MLP's last layer."""
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


class QueryKeyRate(Fault):
    """Steps of W_q and W_k ``factor`` times as large from ``start`` on."""

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


class Rate(Fault):
    """Learning rate times ``factor`` for ``steps`` steps.

    Reached within ``over`` steps.
    """

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


class Temperature(Fault):
    """Scale of the scores times ``factor`` after each of ``steps`` steps."""

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


class SharedDrift(Fault):
    """Biases of queries and keys growing along one direction per head.

    From ``start`` on; all scores of a row grow alike.
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


class Noise(Fault):
    """A share of random bytes in each batch for ``steps`` steps."""

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


class OtherText(Fault):
    """Another text in half of each batch from ``start`` on."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer, *, start: int) -> None:
        super().__init__(model, optimizer)
        self.start = start

    def batch(self, step: int, tokens: Tensor, other: Tensor, generator: torch.Generator) -> Tensor:
        return (
            tokens
            if step < self.start
            else torch.cat([other[: len(other) // 2], tokens[len(tokens) // 2 :]])
        )


class InfiniteGradient(Fault):
    """One step's overflowing gradient of one value projection.

    As of a bad batch in a low precision.
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


FAULTS: dict[str, type[Fault]] = {
    "none": Fault,
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
