"""The references against the models' own eager attention, both wholly in float64."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from references.case import Batch, Case, record_calls
from references.formulas import probabilities
from torch import nn
from torch.overrides import TorchFunctionMode


class LiftFloat32(TorchFunctionMode):
    """Replacement of casts to float32 in a model's code by casts to float64.

    Norms, RoPE, softmax.
    """

    def __torch_function__(
        self,
        func: Any,
        types: Any,
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if func is torch.Tensor.float:
            return args[0].double()
        lifted = [torch.float64 if value is torch.float32 else value for value in args]
        options = {
            name: torch.float64 if value is torch.float32 else value
            for name, value in (kwargs or {}).items()
        }
        return func(*lifted, **options)


def reference_error(case: Case) -> float:
    """Return the largest deviation of a probability from eager attention's weights.

    Rows that see no key are left out: eager attention spreads them evenly. Dropout is off, since
    the returned weights would have it in them.
    """
    options = (
        {"need_weights": True, "average_attn_weights": False}
        if case.attention is nn.MultiheadAttention
        else {}
    )
    model, batch = build_float64(case)
    model.train(case.training)
    for module in model.modules():
        for rate in ("p", "dropout"):
            if isinstance(getattr(module, rate, None), float):
                setattr(module, rate, 0.0)
    with torch.no_grad(), LiftFloat32(), record_calls(model, case.attention, **options) as calls:
        model(**batch)
    if len(calls) != case.expected:
        raise RuntimeError(
            f"{case.name}: {len(calls)} attention calls seen by the reference, not {case.expected}"
        )
    worst = 0.0
    for call in calls:
        attention = case.attend(call, batch)
        own, p = call.outputs[0][-1], probabilities(attention)
        rows = attention.visible.any(-1).expand(p.shape[:-1])
        worst = max(worst, (own - p).abs()[rows].max().item())
    return worst


def build_float64(case: Case) -> tuple[nn.Module, Batch]:
    """Build the case's model and a batch in float64.

    Constants such as RoPE's frequencies included.
    """
    torch.manual_seed(0)
    if case.trained:
        model, batch = case.build("eager")
        return model.double(), batch
    usual = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with LiftFloat32():
            return case.build("eager")
    finally:
        torch.set_default_dtype(usual)
