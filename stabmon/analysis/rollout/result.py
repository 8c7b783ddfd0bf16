"""Result of a rollout."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from stabmon.analysis.record import AnalysisRecord


@dataclass(frozen=True, eq=False)
class Rollout:
    """Shares of the input's tokens in each token after the last layer.

    B samples, T tokens after the last layer (rows), S tokens of the input (columns).

    Attributes:
        matrix: ``[B, T, S]`` float, in [0, 1]; a row sums to 1. T are all tokens or the targets, S
            all tokens or the sources.
        targets: ``[B, T]`` positions; None if all tokens are rows.
        sources: ``[B, S]`` positions; None if all tokens are columns.
        first_token_share: ``[B, T]``, each row's share of the sample's first token that is not
            padding. Under a causal mask it grows with depth whatever the model does, so show it
            beside the picture.
        valid: ``[B, N]`` bool, the tokens that see a key and are not padding; the rows of others
            mean nothing.
        source_valid: the same of the columns' tokens; another sequence's if stacks are joined.
        layers: names of the layers, first to last.
        stack: the stack of layers.
        stacks: all stacks of the model that attended.
        residual, start_layer, head_fusion, weighting: settings of the rollout.
        image_grid: ``{"rows", "cols", "leading"}`` if the columns are image patches after
            ``leading`` special tokens.

    Example:
        >>> import torch
        >>> from stabmon.analysis import attention_rollout
        >>> attention_rollout([torch.full((4, 4), 0.25)] * 2).method
        'rollout of 2 layers from layer 0, heads by mean, residual 0.5'
    """

    matrix: Tensor
    targets: Tensor | None
    first_token_share: Tensor
    valid: Tensor
    source_valid: Tensor
    sources: Tensor | None = None
    layers: tuple[str, ...] = ()
    stack: str = "given maps"
    stacks: tuple[str, ...] = ()
    residual: float = 0.5
    start_layer: int = 0
    head_fusion: str = "mean"
    weighting: str | None = None
    image_grid: Mapping[str, int] | None = None

    @property
    def method(self) -> str:
        """Return the method in words."""
        weighted = f", {self.weighting}-weighted" if self.weighting else ""
        return (
            f"rollout of {len(self.layers)} layers from layer {self.start_layer}{weighted}, heads "
            f"by {self.head_fusion}, residual {self.residual:g}"
        )

    def __repr__(self) -> str:
        return f"Rollout({self.stack}: {self.method}; matrix {list(self.matrix.shape)})"

    def to_record(
        self,
        *,
        attribution: Mapping[str, Any] | None = None,
        faithfulness: Mapping[str, Any] | None = None,
    ) -> AnalysisRecord:
        """Return a record of kind ``rollout``, for figures and pages.

        Values: stack, stacks, layers, residual, start_layer, head_fusion, weighting, method
        (words), targets and sources (``[B][T]`` or None), first_token_share ``[B][T]``, batch_size,
        image_grid, attribution and faithfulness (None if not given).
        Arrays: matrix ``[B, T, S]`` float32, valid ``[B, N]`` and source_valid ``[B, S]`` uint8.

        Args:
            attribution: result of
                :func:`stabmon.analysis.attribution.summary.compute_attention_attribution`.
            faithfulness: result of
                :func:`stabmon.analysis.attribution.faithfulness.deletion_check`, as values.
        """
        values = {
            "stack": self.stack,
            "stacks": list(self.stacks),
            "layers": list(self.layers),
            "residual": self.residual,
            "start_layer": self.start_layer,
            "head_fusion": self.head_fusion,
            "weighting": self.weighting,
            "method": self.method,
            "targets": None if self.targets is None else self.targets.tolist(),
            "sources": None if self.sources is None else self.sources.tolist(),
            "first_token_share": self.first_token_share.float().tolist(),
            "batch_size": len(self.matrix),
            "image_grid": None if self.image_grid is None else dict(self.image_grid),
            "attribution": None if attribution is None else dict(attribution),
            "faithfulness": None if faithfulness is None else dict(faithfulness),
        }
        arrays = {
            "matrix": self.matrix.float().cpu().numpy(),
            "valid": self.valid.byte().cpu().numpy(),
            "source_valid": self.source_valid.byte().cpu().numpy(),
        }
        return AnalysisRecord("rollout", values, arrays)
