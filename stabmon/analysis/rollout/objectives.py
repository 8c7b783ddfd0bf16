"""The number whose gradient weights a rollout."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from stabmon.analysis.rollout.positions import Positions

Objective = Callable[[Any], Tensor] | int | Tensor
"""A function of the model's output that returns a number, a class or token id, or ``[B]`` of
them.
"""


def objective_of(
    output: Any, wanted: Objective | None, targets: Positions | None, valid: Tensor | None
) -> Tensor:
    """Return the objective as a scalar, summed over the samples, which do not touch each other's
    gradients.

    Args:
        output: what the model returned.
        wanted: see :data:`Objective`; None for the model's own top class or token.
        targets: positions whose tokens' log-probabilities are added up, where the output has a row
            a token; None for the last.
        valid: ``[B, N]`` bool, the tokens that are not padding; None where unknown.

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
                f"objective {wanted!r} is no class: there are {log_p.shape[-1]}, 0 to "
                f"{log_p.shape[-1] - 1}"
            )
    return log_p.gather(-1, classes[..., None]).sum()


def logits_of(output: Any) -> Tensor:
    """Return ``[B, classes]`` or ``[B, N, tokens]`` of a model's output.

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
    """Return ``[B, n, classes]``: the rows of the targets, or the last token's, or the sample's one
    row.
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
