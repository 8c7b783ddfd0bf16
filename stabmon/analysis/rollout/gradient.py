"""Rollout of attention weighted by its gradient, without a map of any head.

Chefer's rule takes E_h relu(dL/dA * A) in place of the head mean of A. As o_i = sum_j A_ij v_j, the
gradient is dL/dA_ij = <dL/do_i, v_j>: the values and the gradient at the attention's output, both
as large as the queries, give it for any block of rows. The weighted maps are mixed with the
residual as A is: M = (residual I + (1 - residual) Ā) / row sum, so that with residual 1/2 a row is
Chefer's I + Ā divided by its sum. Without that division R grows with depth. Ā is not normalised
before: a row whose weights do not matter to the objective stays its own token's.

References:
    Chefer, Gur and Wolf 2021, Generic Attention-model Explainability for Interpreting Bi-Modal and
    Encoder-Decoder Transformers.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.analysis.dtypes import compute_dtype
from stabmon.analysis.forward import call_arguments, undisturbed
from stabmon.analysis.rollout.mixing import SampleMaps, maps_of, sample_of
from stabmon.analysis.rollout.objectives import Objective, objective_of
from stabmon.analysis.rollout.positions import Positions
from stabmon.capture.intercept import AttentionSite, intercepted
from stabmon.capture.layout import layout
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall


@dataclass(frozen=True, eq=False)
class Weighed:
    """One attention call with the operands of its gradient."""

    call: AttentionCall
    value: Tensor
    """Values, ``[B, H or H_kv, K, E]``."""
    gradient: Tensor
    """Gradient of the objective by the attention's output, ``[B, H, Q, E]``."""

    def maps(self, index: int) -> tuple[SampleMaps, Tensor]:
        """Return the maps relu(A * dL/dA) of one sample, and its valid rows."""
        operator = operator_of(sample_of(self.call, index))
        value = self.value[index].to(compute_dtype(self.value))
        gradient = self.gradient[index].to(value.dtype)
        heads = len(value)

        def weights(rows: slice) -> tuple[slice, Tensor]:
            cols, found = operator.probabilities_of(rows)
            folded = gradient[:, rows].unflatten(0, (heads, -1)).flatten(1, 2)
            slope = (folded @ value[:, cols].mT).view(found[0].shape)
            return cols, slope.mul_(found[0]).relu_()

        return maps_of(operator, weights), operator.is_counted[0].any(0)


def weighed_calls(
    model: nn.Module,
    batch: Any,
    layers: Mapping[str, bool],
    objective: Objective | None,
    targets: Positions | None,
    last: tuple[str, bool] | None = None,
) -> dict[str, Weighed]:
    """Return the calls of some layers with their gradients, by layer.

    One forward and one backward. Parameters take no part in it: their ``grad`` is as it was.

    Args:
        model, batch: see :func:`stabmon.analysis.forward.run_model`.
        layers: names of the layers, in order, and whether each query is known to be of the same
            token as a key.
        objective, targets: see :func:`stabmon.analysis.rollout.objectives.objective_of`.
        last: likewise the self-attention layer that runs last; its tokens are the output's.

    Returns:
        The calls by layer.

    Raises:
        ValueError: if the attention of a layer is written by hand, so that its output is unknown.
    """
    sites: dict[str, tuple[AttentionCall, Tensor, Tensor, Callable[[Tensor], Tensor]]] = {}
    valid: Tensor | None = None

    def around(site: AttentionSite) -> Any:
        nonlocal valid
        result = site.run()
        if last is not None and site.layer == last[0]:
            valid = operator_of(replace(site.read(), is_self=last[1])).is_counted.any(1)
        if site.layer not in layers:
            return result
        output = result if site.kind == "sdpa" else result[0]
        if not output.requires_grad:
            output = output.detach().requires_grad_(True)
            result = output if site.kind == "sdpa" else (output, *result[1:])
        sites[site.layer] = (
            _detached(replace(site.read(), is_self=layers[site.layer])),
            _value_of(site),
            output,
            _lay_out_of(site),
        )
        return result

    arguments, keywords = call_arguments(model, batch)
    with undisturbed(model), frozen(model), torch.enable_grad(), intercepted(model, around):
        output = model(*arguments, **keywords)
        if missing := [layer for layer in layers if layer not in sites]:
            raise ValueError(
                "weighting='gradient' needs attention through transformers' interface or "
                f"scaled_dot_product_attention, and {missing[0]} has its own: use weighting=None, "
                "or choose other layers by attention_layer_pattern"
            )
        value = objective_of(output, objective, targets, valid)
        if not value.requires_grad:
            raise ValueError(
                "the objective does not depend on the attention of these layers: give another "
                "objective="
            )
        gradients = torch.autograd.grad(
            value, [sites[layer][2] for layer in layers], allow_unused=True
        )
    found = {}
    for layer, gradient in zip(layers, gradients, strict=True):
        call, site_value, out, lay_out = sites[layer]
        filled = torch.zeros_like(out) if gradient is None else gradient
        found[layer] = Weighed(call, site_value, lay_out(filled.detach()))
    return found


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """Turn the gradients of all parameters off, to keep their terms out of the graph."""
    flags = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        for parameter, needed in flags:
            if needed:
                parameter.requires_grad_(False)
        yield
    finally:
        for parameter, needed in flags:
            parameter.requires_grad_(needed)


def _detached(call: AttentionCall) -> AttentionCall:
    tensors = {name: getattr(call, name) for name in ("query", "key", "mask", "sinks", "scores")}
    plain: dict[str, Any] = {
        name: None if tensor is None else tensor.detach() for name, tensor in tensors.items()
    }
    return replace(call, module=None, **plain)


def _value_of(site: AttentionSite) -> Tensor:
    query, value = site.arguments["query"], site.arguments["value"].detach()
    laid_out: Tensor = layout(query.shape, site.module, operand=query.detach())(value)
    return laid_out


def _lay_out_of(site: AttentionSite) -> Callable[[Tensor], Tensor]:
    """Return a function from the result's gradient to the layout ``[B, H, Q, E]``."""
    if site.kind == "transformers":
        return lambda gradient: gradient.transpose(1, 2)
    query = site.arguments["query"].detach()
    return layout(query.shape, site.module, operand=query)
