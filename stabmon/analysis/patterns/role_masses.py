"""Attention mass of each head on the keys of each role.

A *role* defines keys for every query: the first key, the key k positions back, the newest few, the
keys after earlier occurrences of the query's token, its earlier occurrences, or those chosen by a
function of (i, j, ids). Its *mass* in a row is the probability on these keys.

A row can prove a role only if the role's keys are at most a quarter of its visible keys: on any
other row a head with even attention would have the role too. Rows with few visible keys are left
out.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from stabmon.analysis.dtypes import sum_dtype
from stabmon.analysis.patterns.context_rows import first_keys, masked_sums, mass_at
from stabmon.operator import AttentionOperator

RolePattern = int | Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""Definition of a role: an offset k (key i - k), or a function.

The function takes query positions ``[rows, 1]``, key positions ``[1, cols]`` and token ids
``[B, K]`` or None, and returns bool ``[rows, cols]`` or ``[B, rows, cols]``.
"""

LEAST_VISIBLE = 16
"""Fewest visible keys of a counted row, in a long text."""
FEWEST_VISIBLE = 4
"""Fewest visible keys of a counted row, in the shortest text.

A quarter of them is one key.
"""
LOCAL_WIDTH = 16
"""Largest number of keys in the band of ``local``; a row with n keys has n // 4."""
CONTENT = ("induction", "duplicate_token")
NOWHERE = -(1 << 62)
"""Id of no token."""


def least_visible(longest: int) -> int:
    """Return the fewest visible keys of a counted row.

    Args:
        longest: largest number of visible keys of any row.

    Example:
        >>> [least_visible(n) for n in (1000, 24, 6)]
        [16, 12, 4]
    """
    return min(LEAST_VISIBLE, max(FEWEST_VISIBLE, longest // 2))


class RoleMasses:
    """Sums over the rows of one layer, added block by block.

    Args:
        attention: the operator of the call.
        valid: ``[B, Q]`` bool, queries that are no padding.
        is_cross: True if the keys are of another sequence; roles by position or token do not
            apply then.
        is_causal: True if no query sees a later key.
        ids: ``[B, K]`` token ids of the keys, or None.
        custom: further roles by name.

    Attributes:
        names: the R roles.
        together: ``[R, R, H]`` float64: on the rows of the first, the summed mass of the second.
        expected: ``[R, H]`` float64, summed mass of a head with even attention.
        rows: ``[R, H]`` int64, rows that can prove each role.
        overlap: of ``induction`` and ``duplicate_token``: ``[K, H]`` float64, on its rows the
            summed mass of each offset's key where that is one of its own apart from other roles.
        coincide: ``[K, H]`` int64, number of these rows.
        spread: ``[H]`` float64, summed exp(entropy) / visible keys over ``counted`` rows.
    """

    def __init__(
        self,
        attention: AttentionOperator,
        valid: Tensor,
        *,
        is_cross: bool,
        is_causal: bool,
        ids: Tensor | None,
        custom: Mapping[str, RolePattern],
    ) -> None:
        self.attention, self.ids = attention, ids
        self.is_cross, self.is_causal = is_cross, is_causal
        seen = attention.n_visible()
        counted = valid[:, None] & attention.is_counted
        longest = int(torch.where(counted, seen, 0).max().item())
        self.least = least_visible(longest)
        self.longest = longest
        self._seen, self._eligible = seen, counted & (seen >= self.least)
        self._first = first_keys(attention)
        self._functions = {name: f for name, f in custom.items() if not isinstance(f, int)}
        self._offsets = self._offset_names({n: f for n, f in custom.items() if isinstance(f, int)})
        self.offset_names = tuple(self._offsets.values())
        self.function_names = tuple(self._functions)
        self._content = CONTENT if ids is not None and not is_cross else ()
        self.names = ["sink", *self._offsets.values()]
        self.names += [] if is_cross else ["local"]
        for name in self._content:
            self.names += [name, f"{name}_alone"]
        self.names += list(self._functions)
        count, heads, device = len(self.names), attention.heads, attention.query.device
        exact = sum_dtype(attention.query)
        self.together = torch.zeros(count, count, heads, dtype=exact, device=device)
        self.expected = torch.zeros(count, heads, dtype=exact, device=device)
        self.rows = torch.zeros(count, heads, dtype=torch.int64, device=device)
        self.spread = torch.zeros(heads, dtype=exact, device=device)
        self._apart: dict[str, Tensor] = {}
        self.overlap = {
            name: torch.zeros(len(self._offsets), heads, dtype=exact, device=device)
            for name in self._content
        }
        self.coincide = {name: torch.zeros_like(x).long() for name, x in self.overlap.items()}
        self.counted = self._eligible.sum(dim=(0, 2))
        if ids is not None:
            before = torch.full_like(ids, NOWHERE)
            before[:, 1:] = ids[:, :-1]
            self._before = before.scatter(1, self._first[:, :1], NOWHERE)

    def _offset_names(self, custom: Mapping[str, int]) -> dict[int, str]:
        if self.is_cross:
            return {}
        offsets = range(0 if self.is_causal else 1 - LOCAL_WIDTH, LOCAL_WIDTH)
        own = {0: "self", 1: "previous_token"}
        names = {k: own.get(k, f"offset_{k}") for k in offsets}
        return names | {k: name for name, k in custom.items()}

    def add(
        self, p: Tensor, visible: Tensor, rows: slice, cols: slice, entropy: Tensor, own: Tensor
    ) -> None:
        """Add a block.

        Args:
            p: ``[B, H, rows, cols]`` probabilities.
            visible: ``[B or 1, H or 1, rows, cols]`` bool.
            rows, cols: query rows and key columns of the block.
            entropy: ``[B, H, rows]`` of all visible keys, in nats.
            own: ``[rows]`` key index of each query's own token; of the row in cross attention.
        """
        eligible, seen = self._eligible[:, :, rows], self._seen[:, :, rows]
        if not bool(eligible.any()):
            return
        n = seen.to(p.dtype)
        found = self._first_key(p, rows, cols)
        found += self._by_offset(p, visible, cols, own, seen)
        hits = [visible & mask[:, None] for mask in self._by_content(cols, own, seen)]
        hits += [visible & self._mask(f, own, cols)[:, None] for f in self._functions.values()]
        sizes = [hit.sum(-1) for hit in hits]
        found += list(zip(masked_sums(p, hits), sizes, strict=True))
        mass = torch.stack([m for m, _ in found])
        size = torch.stack([s.expand(mass.shape[1:]) for _, s in found]).to(p.dtype)
        testable = eligible & (size > 0) & (4 * size <= n)
        exact = self.together.dtype
        for name in self._content:
            place = self.names.index(name)
            testable[place] &= size[place + 1] > 0
            testable[place + 1] = testable[place]
            both, hit = self._at_offsets(p, self._apart[name], cols, own)
            proving = testable[place].to(p.dtype)
            self.overlap[name] += torch.einsum("bhr,bhrk->kh", proving, both).to(exact)
            coincide = torch.einsum("bhr,brk->kh", proving, hit.to(p.dtype))
            self.coincide[name] += coincide.long()
        chosen = testable.to(p.dtype)
        self.together += torch.einsum("abhr,cbhr->ach", chosen, mass).to(exact)
        self.expected += (chosen * size / n.clamp(min=1)).sum(dim=(1, 3)).to(exact)
        self.rows += testable.sum(dim=(1, 3))
        spread = torch.where(eligible, entropy.exp() / n.clamp(min=1), 0.0)
        self.spread += spread.sum(dim=(0, 2)).to(exact)

    def to_host(self) -> None:
        """Move the sums to the CPU, once for all heads."""
        self.together, self.expected = self.together.cpu(), self.expected.cpu()
        self.rows, self.spread = self.rows.cpu(), self.spread.cpu()
        self.counted = self.counted.cpu()
        self.overlap = {name: both.cpu() for name, both in self.overlap.items()}
        self.coincide = {name: count.cpu() for name, count in self.coincide.items()}

    def _first_key(self, p: Tensor, rows: slice, cols: slice) -> list[tuple[Tensor, Tensor]]:
        return [(mass_at(p, self._first, cols), self.attention.visibility.sees_first[..., rows])]

    def _places(self, p: Tensor, cols: slice, own: Tensor) -> tuple[Tensor, Tensor]:
        """Return the column of the key at each offset, ``[rows, K]``, and its presence."""
        offsets = torch.tensor(list(self._offsets), device=p.device)
        place = own[:, None] - offsets - cols.start
        inside = (place >= 0) & (place < p.shape[-1])
        return place.clamp(0, p.shape[-1] - 1), inside

    def _by_offset(
        self, p: Tensor, visible: Tensor, cols: slice, own: Tensor, seen: Tensor
    ) -> list[tuple[Tensor, Tensor]]:
        """Return the masses of single offsets and of the band."""
        if self.is_cross:
            return []
        place, inside = self._places(p, cols, own)
        mass = torch.where(inside, p.gather(-1, place.expand(*p.shape[:3], -1)), 0.0)
        size = inside & visible.gather(-1, place.expand(*visible.shape[:3], -1))
        is_first = place + cols.start == self._first[:, :, None, None]
        apart = size & ~is_first  # the first key proves a sink, if anything
        found = list(zip(mass.unbind(-1), apart.unbind(-1), strict=True))
        near = self._is_near(torch.tensor(list(self._offsets), device=p.device), seen)
        return [*found, ((mass * near).sum(-1), (size & near).sum(-1))]

    def _is_near(self, back: Tensor, seen: Tensor) -> Tensor:
        """Return whether keys lie in the query's band, ``[…, rows, cols]``.

        Args:
            back: ``[cols]`` or ``[rows, cols]``, positions before the query.
            seen: ``[…, rows]`` visible keys.
        """
        width = (seen // 4).clamp(max=LOCAL_WIDTH)[..., None]
        if self.is_causal:
            return (back >= 0) & (back < width)
        return back.abs() < (width + 1) // 2

    def _at_offsets(
        self, p: Tensor, mask: Tensor, cols: slice, own: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return each offset's mass within ``mask``, and whether its key is in it.

        Args:
            p: ``[B, H, rows, cols]`` probabilities.
            mask: ``[B, rows, cols]`` bool.
            cols: key columns of the block.
            own: ``[rows]`` key index of each query's own token.

        Returns:
            ``[B, H, rows, K]`` and ``[B, rows, K]``.
        """
        place, inside = self._places(p, cols, own)
        hit = inside & mask.gather(-1, place.expand(len(mask), -1, -1))
        return p.gather(-1, place.expand(*p.shape[:3], -1)) * hit[:, None], hit

    def _by_content(self, cols: slice, own: Tensor, seen: Tensor) -> list[Tensor]:
        """Mark keys of induction and duplicate tokens: all of each, then the role's alone.

        Keys of the query's band, the first key, and keys of the other role do not count as alone.
        """
        if not self._content or self.ids is None:
            return []
        keys = torch.arange(cols.start, cols.stop, device=own.device)
        tokens = self.ids[:, own][:, :, None]
        back = own[:, None] - keys
        duplicate = (self.ids[:, None, cols] == tokens) & (back != 0)
        induction = (self._before[:, None, cols] == tokens) & (back != -1)
        named = self._is_near(back, seen.amax(1)) | (keys == self._first[:, :1, None])
        self._apart = {
            "induction": induction & ~named & ~duplicate,
            "duplicate_token": duplicate & ~named & ~induction,
        }
        return [
            induction,
            self._apart["induction"],
            duplicate,
            self._apart["duplicate_token"],
        ]

    def _mask(
        self, function: Callable[[Tensor, Tensor, Tensor | None], Tensor], own: Tensor, cols: slice
    ) -> Tensor:
        keys = torch.arange(cols.start, cols.stop, device=own.device)
        mask = function(own[:, None], keys[None], self.ids)
        if not isinstance(mask, Tensor) or mask.dtype != torch.bool or mask.dim() not in (2, 3):
            raise ValueError(
                "a custom role's function must return a bool tensor [rows, cols] or "
                f"[B, rows, cols]; it returned {getattr(mask, 'dtype', type(mask).__name__)}"
            )
        mask = mask if mask.dim() == 3 else mask[None]
        return mask.expand(-1, len(own), len(keys))
