"""Small runs to act on, and every bit of them as one value."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon.capture import AttentionCapture
from stabmon.interventions import TrainingRun
from stabmon.interventions.run.score_replay import largest_scores
from stabmon.records import AttentionCall, LayerInfo, Reading, StabilityIssue
from tests.support.attention_zoo import zoo

ZOO = zoo()


def run_of(
    name: str, optimizer: type[torch.optim.Optimizer] | None = torch.optim.AdamW, steps: int = 0
) -> TrainingRun:
    """A run on a model of the zoo, after ``steps`` optimizer steps on its batch, its attention seen
    once.
    """
    model, inputs = ZOO[name]()
    return make_run(model, inputs, optimizer, steps)


def make_run(
    model: nn.Module,
    inputs: Mapping[str, Any],
    optimizer: type[torch.optim.Optimizer] | None = torch.optim.AdamW,
    steps: int = 0,
) -> TrainingRun:
    made = None if optimizer is None else optimizer(model.parameters(), lr=1e-2)
    records: list[dict[str, Any]] = []
    run = TrainingRun(model, made, audit=lambda record: records.append(dict(record)))
    run.records = records  # type: ignore[attr-defined]
    for _ in range(steps):
        train_step(run, inputs)
    look(run, inputs)
    run.forwards = [ForwardCall.of(model, (), inputs)]
    run.inputs = inputs  # type: ignore[attr-defined]
    return run


def loss_of(model: nn.Module, inputs: Mapping[str, Any]) -> Tensor:
    """A loss that every output has a part in."""
    out = model(**inputs)
    out = getattr(out, "logits", getattr(out, "last_hidden_state", out))
    return (
        out * torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view_as(out)
    ).sum() / out.numel() ** 0.5


def train_step(run: TrainingRun, inputs: Mapping[str, Any] | None = None) -> float:
    """One step with the marks fired where a monitor fires them."""
    inputs = inputs if inputs is not None else run.inputs  # type: ignore[attr-defined]
    run.optimizer.zero_grad()
    with AttentionCapture(run.model, lambda call: run.step_hooks.fire("attention", call)):
        loss = loss_of(run.model, inputs)
    loss.backward()
    run.step_hooks.fire("before_optimizer_step")
    run.optimizer.step()
    run.step += 1
    run.step_hooks.fire("on_step")
    return loss.item()


def look(run: TrainingRun, inputs: Mapping[str, Any]) -> None:
    """One sampled reading of the largest scores."""
    layers: dict[str, dict[str, np.ndarray]] = {}
    info: dict[str, LayerInfo] = {}

    def on_call(call: AttentionCall) -> None:
        scores = largest_scores(call)
        layers[call.layer] = {"max_logit": scores.double().numpy()}
        width = call.query.shape[-1] if call.query is not None else 0
        info[call.layer] = LayerInfo(len(scores), width, call.scale, "float32")
        assert call.module is not None
        run.layers = {**run.layers, call.layer: call.module}

    with AttentionCapture(run.model, on_call), torch.no_grad():
        run.model(**inputs)
    run.history.add(Reading(run.step, 1.0, layers, info))


def scores_of(run: TrainingRun) -> dict[str, np.ndarray]:
    """The largest scores on the run's batch now, seen by a capture of our own."""
    found: dict[str, np.ndarray] = {}
    with (
        AttentionCapture(
            run.model,
            lambda call: found.__setitem__(call.layer, largest_scores(call).double().numpy()),
        ),
        torch.no_grad(),
    ):
        run.model(**run.inputs)  # type: ignore[attr-defined]
    return found


def growth(layer: str | None, head: int | None = 1, **evidence: Any) -> StabilityIssue:
    """An alarm that a head's scores grew."""
    return StabilityIssue(1, layer, head, "logit_growth", "error", 100.0, 10.0, "clip", evidence)


def all_bits(run: TrainingRun) -> dict[str, Any]:
    """Parameters, buffers, optimizer state, group settings, plain attributes and hooks of every
    module, random state.
    """
    bits: dict[str, Any] = {
        name: tensor.detach().clone() for name, tensor in run.model.state_dict().items()
    }
    if run.optimizer is not None:
        for at, group in enumerate(run.optimizer.param_groups):
            bits |= {f"group {at} {k}": v for k, v in group.items() if k != "params"}
            for each, parameter in enumerate(group["params"]):
                for k, v in run.optimizer.state.get(parameter, {}).items():
                    bits[f"state {at} {each} {k}"] = v.clone() if isinstance(v, Tensor) else v
        bits["optimizer hooks"] = len(run.optimizer._optimizer_step_pre_hooks) + len(
            run.optimizer._optimizer_step_post_hooks
        )
    for name, module in run.model.named_modules():
        bits |= {
            f"{name}.{k}": v
            for k, v in vars(module).items()
            if isinstance(v, (bool, int, float, str, type(None)))
        }
        bits[f"{name} hooks"] = (
            len(module._forward_hooks)
            + len(module._forward_pre_hooks)
            + len(module._backward_hooks)
        )
    bits["random"] = torch.get_rng_state()
    return bits


def differences(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """What is not bit for bit the same."""
    changed = sorted(before.keys() ^ after.keys())
    for name in before.keys() & after.keys():
        one, other = before[name], after[name]
        same = (
            torch.equal(one, other)
            if isinstance(one, Tensor)
            else (one == other and type(one) is type(other))
        )
        if isinstance(one, Tensor) and not same and one.is_floating_point():
            same = torch.equal(one.nan_to_num(nan=7e7), other.nan_to_num(nan=7e7)) and torch.equal(
                one.isnan(), other.isnan()
            )
        changed += [] if same else [name]
    return changed


def first_layer(run: TrainingRun) -> str:
    return next(iter(run.layers))
