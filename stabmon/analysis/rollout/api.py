"""Entry point of attention rollout, in the memory of its result."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from stabmon.analysis.rollout.given_maps import is_given
from stabmon.analysis.rollout.mixing import FUSIONS, HeadFusion
from stabmon.analysis.rollout.objectives import Objective
from stabmon.analysis.rollout.positions import Positions, Wanted
from stabmon.analysis.rollout.result import Rollout
from stabmon.analysis.rollout.run import roll_given, roll_model
from stabmon.analysis.rollout.stack_walk import Settings


def attention_rollout(
    model: nn.Module | Sequence[Any],
    batch: Any = None,
    *,
    targets: Wanted | None = None,
    sources: Wanted | None = None,
    residual: float = 0.5,
    start_layer: int = 0,
    head_fusion: HeadFusion = "mean",
    weighting: str | None = None,
    objective: Objective | None = None,
    stack: str | None = None,
    attention_layer_pattern: str | None = None,
    attention_modules: tuple[str, ...] = (),
    chunk_size: int | None = None,
) -> Rollout:
    """Attribute the tokens after the last layer to those of the input.

    R_l = M_l R_{l-1}, R_0 = I, with M_l = (residual I + (1 - residual) A_l) / row sum and A_l the
    layer's attention, its heads fused; the later layer multiplies from the left, and the first
    layer has a residual like the others. Where the rows of A_l sum to 1 and residual is 1/2 this is
    (A_l + I) / 2, Abnar and Zuidema's. Rows of maxima and minima, and those beside a learned sink,
    have other sums and are normalised. A row without visible keys becomes the identity's.

    The full matrix is made during the forward and nothing is kept of a layer, so that beside the
    result (B S^2 numbers) there is one block of rows. With ``targets`` the queries and keys of all
    layers are kept and vectors are carried down: linear in S. With ``sources`` vectors are carried
    up and nothing is kept. No map of a head is ever held.

    ``stack="joined"`` is our own: the rollout over the tokens of both stacks. A cross-attention
    layer mixes as a self-attention layer does, so that R = sum_l w_l R_dec(after l) C_l R_enc, w_l
    the residual's share; rows are normalised over the encoder's tokens.

    Args:
        model: any model with captured attention (``docs/capture.md``); or a list of maps, first
            layer first, each ``[B, H, S, S]``, ``[B, S, S]`` with the heads fused, or ``[S, S]``.
        batch: the model's input, as in :func:`stabmon.analysis.forward.run_model`.
        targets: rows to compute: a position, several, or ``[B, n]``. Negative ones count from the
            end of the sample's own tokens.
        sources: columns to compute, likewise: the influence of these tokens.
        residual: weight of the residual path, in [0, 1).
        start_layer: the first layer that counts, from 0.
        head_fusion: ``mean``, ``max`` or ``min`` over the heads.
        weighting: ``gradient`` weights A by relu of its gradient, entry by entry: see
            :mod:`stabmon.analysis.rollout.gradient`.
        objective: with ``gradient``: the number to differentiate. A class or token id, ``[B]`` of
            them, or a function from the model's output to a number; None for the log-probability
            of the model's own top class, or of its top token at the last target (at the last token
            without targets).
        stack: the stack of a model with several: its name, or ``joined`` for an encoder and its
            decoder, or ``all`` for every self-attention layer in the order of the forward. None
            for the one that attends last.
        attention_layer_pattern: regular expression that a layer's name must contain; it selects
            before ``start_layer``.
        attention_modules: ``fnmatch`` patterns of modules whose hand-written softmax is attention,
            in case it is not found.
        chunk_size: samples in one forward; None for all. Halved when memory runs out.

    Returns:
        The rollout: ``matrix [B, T, S]``, float32 (float64 of a float64 model), rows sum to 1. NaN
        where the model is NaN.

    Raises:
        ValueError: if nothing attends, a pattern, stack, position or number does not fit, or tokens
            are merged or regrouped between layers (windows), which have no rollout.

    Example:
        >>> import torch
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
        >>> rollout = attention_rollout(model, torch.randn(2, 5, 8))
        >>> rollout.matrix.shape, bool(torch.allclose(rollout.matrix.sum(-1), torch.ones(2, 5)))
        (torch.Size([2, 5, 5]), True)
        >>> attention_rollout([torch.eye(4), torch.full((4, 4), 0.25)], targets=-1).matrix
        tensor([[[0.1250, 0.1250, 0.1250, 0.6250]]])

    References:
        Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers. Chefer et al. 2021,
        Generic Attention-model Explainability.
    """
    settings = Settings(
        check_residual(residual),
        start_layer,
        check_fusion(head_fusion),
        None if targets is None else Positions(targets, "target"),
        None if sources is None else Positions(sources, "source"),
        stack,
        attention_layer_pattern,
        attention_modules,
    )
    if weighting not in (None, "gradient"):
        raise ValueError(f"weighting {weighting!r}: give None or 'gradient'")
    if weighting is None and objective is not None:
        raise ValueError("objective is given and weighting is None: use weighting='gradient'")
    if is_given(model):
        if batch is not None or weighting or stack or attention_layer_pattern:
            raise ValueError(
                "given maps take no batch, weighting, stack or attention_layer_pattern: give the "
                "model for these"
            )
        return roll_given(list(model), settings)  # type: ignore[arg-type]
    if not isinstance(model, nn.Module):
        raise ValueError(
            f"model is a {type(model).__name__}: give a torch.nn.Module, or a list of attention "
            "maps"
        )
    return roll_model(
        model, batch, settings, weighting=weighting, objective=objective, chunk_size=chunk_size
    )


def check_residual(residual: float) -> float:
    """Return the weight, or raise ``ValueError`` for one outside [0, 1)."""
    if not 0 <= residual < 1:
        raise ValueError(f"residual {residual!r}: give a weight from 0 up to, not including, 1")
    return float(residual)


def check_fusion(fusion: HeadFusion) -> HeadFusion:
    """Return the fusion, or raise ``ValueError`` for an unknown one."""
    if fusion not in FUSIONS:
        raise ValueError(f"head_fusion {fusion!r}: give mean, max or min")
    return fusion
