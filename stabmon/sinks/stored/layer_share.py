"""Choose the layers of a reading that one line of the records holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence

import numpy as np

MOST_VALUES = 150_000
"""Values of heads in one line: about 1.6 MB, and 0.1 s to write."""


class LayerShare:
    """Chooser of layers for lines of bounded size, so that all take turns.

    A model whose values fit has all its layers in every line. Of a larger one each line holds the
    layers with an open issue, and as many others as fit, in turn.

    Args:
        most_values: values of heads in one line.

    Example:
        >>> share = LayerShare(most_values=4)
        >>> layers = {name: {"max_logit": np.zeros(2)} for name in "abc"}
        >>> share.chosen(layers, ()), share.chosen(layers, ("c",))
        (['a', 'b'], ['a', 'c'])
    """

    def __init__(self, most_values: int = MOST_VALUES) -> None:
        self._most_values, self._next = most_values, 0

    def chosen(
        self, layers: Mapping[str, Mapping[str, np.ndarray]], first: Collection[str]
    ) -> list[str]:
        """Return the layers of the next line, in the order of the reading.

        Args:
            layers: the signals of each layer.
            first: layers that come before others.
        """
        sizes = {
            layer: max(1, sum(map(np.size, signals.values()))) for layer, signals in layers.items()
        }
        if sum(sizes.values()) <= self._most_values:
            return list(layers)
        names: Sequence[str] = list(layers)
        at = self._next % len(names)
        turn = [*names[at:], *names[:at]]
        taken: set[str] = set()
        left = self._most_values
        for layer in (*(name for name in turn if name in first), *turn):
            if layer in taken:
                continue
            if taken and sizes[layer] > left:
                break
            taken.add(layer)
            left -= sizes[layer]
        others = [at for at, layer in enumerate(turn) if layer in taken and layer not in first]
        self._next = (at + others[-1] + 1 if others else at + 1) % len(names)
        return [layer for layer in names if layer in taken]
