"""Name what this rank holds by the names that it has in the whole run."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class RankShare:
    """The layers and heads of the whole run that this rank holds.

    A layer has its *own* name in this rank's model, and a *common* one that all ranks use: in
    readings, issues and records, and where interventions are judged and carried out.

    Example:
        >>> share = RankShare("stage1.", {"attn": (4, 8)}, frozenset({"stage0.attn"}))
        >>> share.common("attn"), share.own("stage1.attn"), share.own("stage0.attn")
        ('stage1.attn', 'attn', None)
        >>> share.is_elsewhere("stage0.attn"), share.is_elsewhere("stage1.attn")
        (True, False)
    """

    prefix: str = ""
    """Prefix of common names, of a pipeline stage whose own names other stages have as well."""
    heads: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """First head here, and number of heads in all, of layers that are split; by own name."""
    elsewhere: frozenset[str] = frozenset()
    """Common names of the layers that only other pipeline stages hold."""
    is_staged: bool = False
    """Ranks are stages of a pipeline, or other models: some hold layers that others lack."""

    @property
    def is_whole(self) -> bool:
        """Return whether this rank holds the whole model, by the names that all use."""
        return not self.prefix and not self.heads and not self.is_staged

    def common(self, layer: str) -> str:
        """Return the name that all ranks use for a layer of this rank."""
        return f"{self.prefix}{layer}"

    def own(self, layer: str) -> str | None:
        """Return this rank's own name of a layer; None where other stages hold it."""
        if layer in self.elsewhere or not layer.startswith(self.prefix):
            return None
        return layer.removeprefix(self.prefix)

    def is_elsewhere(self, layer: str | None) -> bool:
        """Return whether only other stages hold a layer; it may be a later call (``name#1``)."""
        return layer is not None and (
            layer in self.elsewhere or layer.partition("#")[0] in self.elsewhere
        )

    def span(self, layer: str, count: int) -> tuple[int, int]:
        """Return the first head here, and the number of heads in all.

        Args:
            layer: this rank's own name of it.
            count: the number of heads here.
        """
        return self.heads.get(layer, (0, count))

    def spread(self, layer: str, values: Tensor, fill: float = -torch.inf) -> Tensor:
        """Return values of the heads here among those of all heads.

        Args:
            layer: this rank's own name of it.
            values: ``[H]`` of the heads here.
            fill: the value of heads that are on other ranks.

        Returns:
            ``[N]`` of all heads of the layer.

        Example:
            >>> RankShare(heads={"attn": (2, 4)}).spread("attn", torch.ones(2))
            tensor([-inf, -inf, 1., 1.])
        """
        first, total = self.span(layer, len(values))
        if total == len(values):
            return values
        whole = torch.full((total,), fill, dtype=values.dtype, device=values.device)
        whole[first : first + len(values)] = values
        return whole

    def named(
        self, layers: Mapping[str, Mapping[str, np.ndarray]]
    ) -> dict[str, dict[str, np.ndarray]]:
        """Return this rank's own readings by common names, NaN for heads of other ranks.

        Args:
            layers: ``[layer][signal]`` is ``[H]`` of the heads here, by own names.
        """
        return {
            self.common(layer): {
                name: self.spread(layer, torch.from_numpy(values), torch.nan).numpy()
                for name, values in signals.items()
            }
            for layer, signals in layers.items()
        }
