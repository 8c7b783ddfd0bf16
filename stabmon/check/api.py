"""The check: a model and a sample in, a report out, the model unchanged."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from stabmon.capture import clean_name
from stabmon.check.config import CheckConfig, check_config
from stabmon.check.judging.advice import finite_weights
from stabmon.check.judging.findings import Basis, Finding, ranked
from stabmon.check.judging.judge import judge
from stabmon.check.judging.precision import precision_table
from stabmon.check.measuring.expect import LayerView, layer_views
from stabmon.check.measuring.observe import not_finite_in, observe
from stabmon.check.region.region import OperatingPoint, region_data, stability_region
from stabmon.check.report.report import StabilityReport
from stabmon.nonfinite.bad_values import count_bad
from stabmon.nonfinite.first_bad_tensor import find_in_forward

MOST_NAMES = 5


def check_attention_stability(
    model: nn.Module,
    sample_input: Any,
    config: CheckConfig | Mapping[str, Any] | str | None = None,
    *,
    subject: str | None = None,
    analytic: bool = False,
) -> StabilityReport:
    """Predict whether a model's attention will be stable in training.

    The prediction follows from the weights and from one forward and backward. The model, its
    gradients, its training mode, its buffers and the random generators are left exactly as they
    were.

    Args:
        model: any module that attends, as it is going to be trained.
        sample_input: arguments of its forward: a mapping of keyword arguments, a tuple of
            positional ones, or one tensor. With labels the backward starts at the model's own loss,
            else at the mean square of its output.
        config: a :class:`CheckConfig`, a mapping of its fields (``{"dtype": "bf16", "seq_len":
            4096}``), a dtype's name, or None.
        subject: the model's name in the report; its class if None.
        analytic: True where the weights were made for this check; findings are then called
            analytic.

    Returns:
        The report, also a mapping with ``expected_logit_max`` (largest score to expect of a row),
        ``curvature_bound`` (the tight bound on the softmax's curvature in query and keys, not its
        logarithm), ``precision_bits_needed`` (mantissa bits on the path that the model takes;
        bfloat16 has 8, float16 has 11), ``float16_safe``, ``bfloat16_safe``, ``recommendations``
        (empty for a healthy model), ``findings``, ``precision`` and ``heads``.

    Raises:
        TypeError: if ``model`` is no module.
        ValueError: for an invalid configuration, or if no attention was seen. Errors of the model
            itself are passed on.

    Example:
        >>> layer = nn.TransformerEncoderLayer(32, 2, batch_first=True)
        >>> report = check_attention_stability(layer, torch.randn(1, 16, 32), "bf16")
        >>> report["verdict"], report["bfloat16_safe"]
        ('pass', True)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"model is a {type(model).__name__}: give a torch.nn.Module")
    settings = check_config(config)
    args, kwargs = _arguments(sample_input)
    subject = subject or type(model).__name__
    if bad := bad_weights(model):
        return StabilityReport(
            subject, settings, settings.seq_len or 0, (), (_bad_weights(bad),), (), analytic
        )
    seen = observe(model, args, kwargs, settings)
    views = tuple(layer_views(seen, settings.seq_len))
    basis: Basis = "analytic" if analytic else "measured"
    findings = judge(views, settings, basis)
    broken_call = not_finite_in(model, args, kwargs, settings)
    if broken_call is not None:
        found = find_in_forward(model, [broken_call], 0)
        where = "the output" if found is None else f"{found.tensor} ({found.detail})"
        findings.append(
            Finding(
                "non_finite",
                "critical",
                basis,
                float("inf"),
                float(torch.finfo(settings.torch_dtype).max),
                f"a forward in {settings.dtype} is not finite, first in {where}",
                None if found is None else found.layer,
                None if found is None else found.head,
            )
        )
    return StabilityReport(
        subject=subject,
        config=settings,
        length=settings.seq_len or max(seen.keys.values()),
        views=views,
        findings=ranked(findings),
        precision=precision_table(views, settings, broken_call is not None),
        analytic=analytic,
        loss=seen.loss,
        gradients=seen.gradients,
        sample=_described(args, kwargs),
        notes=(*seen.notes, *_unknown(views)),
        extra={"region": _region(views, settings)} if settings.region else {},
    )


def bad_weights(model: nn.Module) -> dict[str, str]:
    """Return the parameters and buffers with non-finite values.

    Every parameter that is not finite and every buffer with a NaN, by name, with the number of its
    bad values in words.
    """
    found = {
        clean_name(name): bad for name, each in model.named_parameters() if (bad := count_bad(each))
    }
    for name, each in model.named_buffers():
        if each.is_floating_point() and bool(each.isnan().any()):
            found[clean_name(name)] = count_bad(each)
    return found


def _bad_weights(bad: Mapping[str, str]) -> Finding:
    named = [f"{name} ({what})" for name, what in list(bad.items())[:MOST_NAMES]]
    more = f" and {len(bad) - MOST_NAMES} more" if len(bad) > MOST_NAMES else ""
    first = next(iter(bad))
    layer = first.rpartition(".")[0] or None
    text = f"weights are not finite: {', '.join(named)}{more}; nothing else can be checked"
    return Finding(
        "non_finite",
        "critical",
        "analytic",
        len(bad),
        0,
        text,
        layer,
        None,
        finite_weights(", ".join(bad)[:200]),
    )


def _region(views: Sequence[LayerView], settings: CheckConfig) -> dict[str, Any]:
    origin = OperatingPoint.of(views)
    return region_data(origin, stability_region(origin, settings))


def _arguments(sample: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    if isinstance(sample, Mapping):
        return (), {str(name): value for name, value in sample.items()}
    if isinstance(sample, tuple | list):
        return tuple(sample), {}
    if isinstance(sample, Tensor):
        return (sample,), {}
    raise ValueError(
        f"sample_input is a {type(sample).__name__}: give a mapping of keyword arguments, a "
        "tuple, or a tensor"
    )


def _described(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    """Name the tensors of a sample with their shapes."""
    given = {**{f"argument {at}": each for at, each in enumerate(args, start=1)}, **kwargs}
    return ", ".join(
        f"{name} {list(each.shape)}" for name, each in given.items() if isinstance(each, Tensor)
    )


def _unknown(views: Sequence[LayerView]) -> list[str]:
    reasons = dict.fromkeys(view.unknown for view in views if view.unknown)
    return [
        f"no scores are predicted, since weights cannot be assigned to heads: {reason}"
        for reason in reasons
    ]
