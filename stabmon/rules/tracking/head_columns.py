"""The column of each head in a history's arrays."""

from __future__ import annotations


class HeadColumns:
    """The heads of all layers, side by side: each layer is a range of columns.

    Example:
        >>> columns = HeadColumns()
        >>> columns.place("a", 2)
        >>> columns.place("b", 1)
        >>> columns.heads, columns.spans["b"]
        ([('a', 0), ('a', 1), ('b', 0)], slice(2, 3, None))
        >>> columns.resize("a", 1)
        >>> columns.heads, columns.spans["b"]
        ([('a', 0), ('b', 0)], slice(1, 2, None))
    """

    def __init__(self) -> None:
        self.heads: list[tuple[str, int]] = []
        """(layer, head) of each column."""
        self.spans: dict[str, slice] = {}
        """Columns of each layer, in order."""
        self._other_counts: dict[str, int] = {}
        """Number of heads of layers that had another one than known at the newest reading."""

    def count(self, layer: str) -> int:
        """Return the number of a layer's heads."""
        span = self.spans[layer]
        return int(span.stop - span.start)

    def place(self, layer: str, heads: int) -> None:
        """Give a new layer its columns, after all others."""
        start = len(self.heads)
        self.spans[layer] = slice(start, start + heads)
        self.heads += [(layer, head) for head in range(heads)]

    def note_count(self, layer: str, heads: int | None) -> bool:
        """Note a layer's number of heads at a reading, and return whether it has changed for good.

        Args:
            layer: a layer with columns.
            heads: the number; None where it is not clear.

        Returns:
            True at the second reading in a row with the same other number than known.
        """
        before = self._other_counts.pop(layer, None)
        if heads is None or heads == self.count(layer):
            return False
        if heads == before:
            return True
        self._other_counts[layer] = heads
        return False

    def resize(self, layer: str, heads: int) -> None:
        """Give a layer another number of columns where it is; those of later layers move."""
        old = self.spans[layer]
        more = heads - self.count(layer)
        self.heads[old] = [(layer, head) for head in range(heads)]
        self.spans = {
            name: slice(
                span.start + more * (span.start > old.start),
                span.stop + more * (span.start >= old.start),
            )
            for name, span in self.spans.items()
        }
