"""Objective of a gradient-weighted rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabmon.analysis.rollout.positions import Positions

Objective = Callable[[Any], Tensor] | int | Tensor
"""A class or token id, ``[B]`` ids, or a function from the output to a number."""


def objective_of(
    output: Any, wanted: Objective | None, targets: Positions | None, valid: Tensor | None
) -> Tensor:
    """Return the objective as a scalar, summed over the samples.

    Samples do not affect each other's gradients.

    Args:
        output: the model's output.
        wanted: see :data:`Objective`; None for the model's own top class or token.
        targets: positions of the added log-probabilities, if the output has a row per token; None
            for the last.
        valid: ``[B, N]`` bool, the tokens that are not padding; None if unknown.

    Raises:
        ValueError: if the output has no logits, or the function returns no number.
    """
    if callable(wanted):
        value = wanted(output)
        if not isinstance(value, Tensor) or value.numel() != 1 or not value.requires_grad:
            raise ValueError(
                "objective must return one number that depends on the model's attention"
            )
        return value.reshape(())
    log_p = rows_of(logits_of(output), targets, valid).float().log_softmax(-1)
    if wanted is None:
        classes = log_p.detach().argmax(-1)
    else:
        given = torch.as_tensor(wanted, device=log_p.device).reshape(-1, 1)
        if len(given) not in (1, len(log_p)):
            raise ValueError(
                f"objective is given for {len(given)} samples, and the batch has {len(log_p)}"
            )
        classes = given.expand(log_p.shape[:2])
        if bool((classes < 0).any()) or bool((classes >= log_p.shape[-1]).any()):
            raise ValueError(
                f"objective {wanted!r} is not a class: there are {log_p.shape[-1]}, 0 to "
                f"{log_p.shape[-1] - 1}"
            )
    return log_p.gather(-1, classes[..., None]).sum()


def logits_of(output: Any) -> Tensor:
    """Return the logits in a model's output, ``[B, classes]`` or ``[B, N, tokens]``.

    Raises:
        ValueError: if there are none.
    """
    logits = output if isinstance(output, Tensor) else getattr(output, "logits", None)
    if logits is None and isinstance(output, dict):
        logits = output.get("logits")
    if logits is None and isinstance(output, tuple) and output and isinstance(output[0], Tensor):
        logits = output[0]
    if (
        not isinstance(logits, Tensor)
        or logits.ndim not in (2, 3)
        or not logits.is_floating_point()
    ):
        raise ValueError(
            f"the output ({type(output).__name__}) has no logits [B, classes] or [B, N, tokens]: "
            "give objective=, a function of it"
        )
    return logits


def rows_of(logits: Tensor, targets: Positions | None, valid: Tensor | None) -> Tensor:
    """Return the logits of the targets, ``[B, n, classes]``.

    Args:
        logits: ``[B, classes]``, whose one row is returned, or ``[B, N, classes]``.
        targets: positions; None for the last token.
        valid: ``[B, N]`` bool, the tokens that are not padding; None if unknown.
    """
    if logits.ndim == 2:
        return logits[:, None]
    if valid is None or valid.shape != logits.shape[:2]:
        valid = torch.ones(logits.shape[:2], dtype=torch.bool, device=logits.device)
    wanted = targets or Positions(-1, "target")
    places = torch.stack([wanted.of(index, row) for index, row in enumerate(valid)]).to(
        logits.device
    )
    return logits.gather(1, places[..., None].expand(-1, -1, logits.shape[2]))
