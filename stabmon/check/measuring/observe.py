"""Measurements of one forward and one backward without a trace in the model.

H query heads, D head dimension.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.outputs import loss_in
from stabmon._torch.tensors import tensors_in
from stabmon.capture import AttentionCapture
from stabmon.check.config import DTYPES, CheckConfig
from stabmon.check.measuring.rounding import PATHS, moved, rows_of
from stabmon.operator.dense import DenseAttention
from stabmon.records import AttentionCall, LayerInfo
from stabmon.signals.accumulator import Measurements, to_host

SIGNALS = (
    *(
        "attention_entropy",
        "normalized_entropy",
        "max_logit",
        "max_probability",
        "saturated_fraction",
    ),
    *("hnf_log_curvature", "hnf_log_curvature_bound", "precision_bits"),
)


@dataclass(frozen=True, eq=False)
class Observation:
    """Measurements of one forward and backward."""

    layers: Mapping[str, Mapping[str, np.ndarray]]
    """``layers[layer][name]``, float64 ``[H]``: the signals, and

    - ``score_spread``, the mean over rows of the standard deviation of a row's visible scores
      without bias; NaN where unknown;
    - ``query_size`` and ``key_size``, the root mean square of an entry;
    - ``biased``, 1 where a position bias is, or may have been, added to scores;
    - ``moved/<path>/<dtype>``, the mean over rows of the probability moved by rounding; NaN where a
      rounded score is inf.
    """
    info: Mapping[str, LayerInfo]
    modules: Mapping[str, nn.Module]
    keys: Mapping[str, int]
    """Number of keys of each layer's calls."""
    visible: Mapping[str, int]
    """Largest number of keys visible to one row: smaller under a window."""
    loss: float | None
    gradients: Mapping[str, float]
    """L2 norm of the gradient of each attention module's own parameters.

    Empty where no backward was made.
    """
    notes: tuple[str, ...] = ()


@dataclass
class _Watch:
    """Measures each attention call of a forward."""

    config: CheckConfig
    measurements: Measurements
    found: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    keys: dict[str, int] = field(default_factory=dict)
    visible: dict[str, int] = field(default_factory=dict)

    def add(self, call: AttentionCall) -> None:
        self.measurements.add(call)
        exact = rows_of(call, self.config.rows)
        has_bias = call.query is None or exact._hidden_and_bias[1] is not None
        values = {
            "score_spread": torch.full((exact.heads,), math.nan),
            "biased": torch.full((exact.heads,), float(has_bias)),
        }
        for path in PATHS:
            for name, dtype in DTYPES.items():
                if dtype != torch.float32:
                    values[f"moved/{path}/{name}"] = moved(exact, dtype, path).mean(dim=(0, 2))
        if call.query is not None and call.key is not None:
            key_size = _size(call.key).repeat_interleave(call.query.shape[1] // call.key.shape[1])
            values |= {
                "score_spread": _spread(exact),
                "query_size": _size(call.query),
                "key_size": key_size,
            }
        self.found[call.layer] = {
            name: value.cpu().double().numpy() for name, value in values.items()
        }
        self.keys[call.layer] = exact.keys
        self.visible[call.layer] = int(exact.n_visible().max())


def observe(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: CheckConfig
) -> Observation:
    """Measure every attention call of one forward and backward.

    In the precision of the weights. The model, its gradients, buffers and mode and the global
    random generators are left as they were.

    Args:
        model: the module.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.
        config: seed and number of rows.

    Raises:
        ValueError: if no attention was seen, or measuring it failed. Errors of the model itself are
            passed on.
    """
    notes: list[str] = []
    call = ForwardCall.of(model, args, kwargs)
    call = replace(
        call, autocast={device: (False, dtype) for device, (_, dtype) in call.autocast.items()}
    )
    try:
        return _observe(model, call, config, True, notes)
    except (RuntimeError, NotImplementedError) as error:
        if "out of memory" in str(error):
            raise
        first = " ".join(str(error).split())[:160]
        found = _observe(
            model, call, config, False, notes
        )  # raises the same again where the forward is to blame
        return replace(found, notes=(*found.notes, f"no backward was made: {first}"))


def _observe(
    model: nn.Module, call: ForwardCall, config: CheckConfig, backward: bool, notes: list[str]
) -> Observation:
    errors: list[Exception] = []
    watch = _Watch(config, Measurements(SIGNALS))
    gradients: dict[str, float] = {}
    with call.again(model) as forward, torch.set_grad_enabled(backward):
        torch.manual_seed(config.seed)
        with AttentionCapture(
            model, watch.add, always_watch_functions=True, on_error=errors.append
        ) as capture:
            output = forward()
        loss = loss_in(output)
        parameters = {name: each for name, each in model.named_parameters() if each.requires_grad}
        if backward and parameters:
            root = loss if loss is not None else _stand_in(output)
            if root is not None and root.requires_grad:
                found = torch.autograd.grad(root, list(parameters.values()), allow_unused=True)
                gradients = _norms(
                    dict(zip(parameters.values(), found, strict=True)), watch.measurements.modules
                )
    if errors:
        raise ValueError(f"measuring attention failed: {errors[0]}") from errors[0]
    if not watch.found:
        raise ValueError(
            f"no attention was found in {type(model).__name__}. Give a model that attends; looked "
            f"for {capture.looked_for()}"
        )
    layers = to_host(watch.measurements.sums)
    return Observation(
        layers={layer: {**layers[layer], **watch.found[layer]} for layer in layers},
        info=watch.measurements.info,
        modules=watch.measurements.modules,
        keys=watch.keys,
        visible=watch.visible,
        loss=None if loss is None else float(loss.detach()),
        gradients=gradients,
        notes=tuple(notes),
    )


def not_finite_in(
    model: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any], config: CheckConfig
) -> ForwardCall | None:
    """Run a forward in the training precision; return it if it is not finite.

    Args:
        model: the module.
        args: positional arguments of its forward.
        kwargs: keyword arguments of its forward.
        config: precision and seed.

    Returns:
        The call, for a search where it breaks down; None where its loss, or every output, is
        finite.
    """
    device = next((each.device.type for each in model.parameters()), "cpu")
    call = ForwardCall.of(model, args, kwargs)
    half = config.torch_dtype != torch.float32
    call = replace(
        call,
        autocast={**call.autocast, device: (half, config.torch_dtype if half else torch.bfloat16)},
    )
    with call.again(model) as forward:
        torch.manual_seed(config.seed)
        output = forward()
    loss = loss_in(output)
    tensors = (
        [loss]
        if loss is not None
        else [each for each in tensors_in(output) if each.is_floating_point()]
    )
    fine = all(bool(each.masked_fill(each == -math.inf, 0).isfinite().all()) for each in tensors)
    return None if fine else call


def _stand_in(output: Any) -> Tensor | None:
    """Return a loss for a model without one.

    Half the mean square of its first floating output.
    """
    first = next(
        (each for each in tensors_in(output) if each.is_floating_point() and each.requires_grad),
        None,
    )
    return None if first is None else first.float().square().mean() / 2


def _norms(
    gradients: Mapping[nn.Parameter, Tensor | None], modules: Mapping[str, nn.Module]
) -> dict[str, float]:
    found = {}
    for layer, module in modules.items():
        own = [
            each
            for parameter in module.parameters()
            if (each := gradients.get(parameter)) is not None
        ]
        if own:
            found[layer] = math.sqrt(sum(float(each.float().norm()) ** 2 for each in own))
    return found


def _spread(exact: DenseAttention) -> Tensor:
    """Return the mean standard deviation ``[H]`` of a row's scores without bias.

    Rows of fewer than 4 visible keys are left out.
    """
    scores, visible = exact._raw, exact.logits > -torch.inf
    count = visible.sum(-1)
    held = scores.masked_fill(~visible, 0.0)
    mean = held.sum(-1) / count.clamp(min=1)
    variance = ((scores - mean[..., None]).masked_fill(~visible, 0.0)).square().sum(-1) / (
        count - 1
    ).clamp(min=1)
    counted = count >= 4
    return variance.sqrt().masked_fill(~counted, 0.0).sum(dim=(0, 2)) / counted.sum(dim=(0, 2))


def _size(tensor: Tensor) -> Tensor:
    return tensor.float().square().mean(dim=(0, 2, 3)).sqrt()
