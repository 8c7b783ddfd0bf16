"""Roles of heads, each with the proving mass.

A role holds if its mass (see :mod:`stabmon.analysis.patterns.role_masses`) is at least its share on
the rows that can prove it, and at least twice that of a head with even attention. A head may hold
several roles, if they do not compete: if two of them each take 0.3 of the same rows, the head is
``mixed`` and neither of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from stabmon.analysis.patterns.role_masses import CONTENT, LEAST_VISIBLE, RoleMasses

SHARE = 0.5
"""Smallest mass of a role."""
SINK_SHARE = 0.3
"""Smallest mass of ``sink`` (Gu et al. 2024), and of a competing second role."""
EVENLY = 0.9
"""Smallest share of effective keys exp(entropy) in visible keys for ``uniform``."""
LEAST_ROWS = 4
"""Smallest number of rows to prove a role."""
TOGETHER = 0.8
"""Smallest joint mass of two offsets to be two roles, and no band."""
APART = 0.2
"""Smallest share of a content role's mass on keys of no other role."""
REST_OF_BAND = 0.25
"""Smallest mass of a band beside its largest offset.

With less, the head has the role of that offset.
"""

NOT_TESTABLE = {
    "induction": "no token comes again after one that stands apart from the other roles",
    "duplicate_token": "no token comes again apart from the other roles",
}
TOO_FEW = "too few rows see its keys and at least three times as many others"


@dataclass(frozen=True, eq=False)
class HeadRole:
    """One role of one head.

    Attributes:
        layer: the layer's name.
        head: the query head.
        role: ``sink`` (first visible key), ``previous_token``, ``self``, ``offset_k`` (key i - k),
            ``local`` (a band of the newest keys), ``induction`` (keys after earlier occurrences of
            the token), ``duplicate_token`` (its earlier occurrences), ``uniform``, ``mixed``, or
            the name of a custom role.
        evidence: ``mass``, the mean probability on the role's keys, in [0, 1] (of ``uniform``:
            effective keys over visible keys; of ``mixed``: the largest mass of any role);
            ``expected``, the same of a head with even attention; ``rows``, the number of query
            rows that could prove it; ``share``, the required mass; ``least_visible``, the fewest
            visible keys of these rows; ``masses``, ``all_rows`` and ``all_expected``: every role's;
            ``effective_share``: effective keys over visible keys; ``not_testable``: role ->
            reason; of ``mixed`` ``between``: the two competing roles, if any; of ``induction`` and
            ``duplicate_token`` in a text with a short period ``indistinguishable_from``: the offset
            that would explain it as well.

    Example:
        >>> HeadRole("h.0", 3, "sink", {"mass": 0.8}).role
        'sink'
    """

    layer: str
    head: int
    role: str
    evidence: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class _Head:
    """Mean masses of one head."""

    masses: dict[str, float]
    expected: dict[str, float]
    rows: dict[str, int]
    together: dict[str, dict[str, float]]
    """On the rows of the first role, the mass of the second."""
    offsets: tuple[str, ...]
    overlap: dict[str, dict[str, float]]
    """Mass of each offset's key on a content role's rows, if it is the role's alone."""
    elsewhere: dict[str, dict[str, float]]
    """Mass of each offset's key in all other rows, by content role; NaN if few."""

    def holds(self, role: str) -> bool:
        """Return whether the role's mass alone is large enough."""
        if self.rows[role] < LEAST_ROWS:
            return False
        mass = self.masses[role]
        if mass < 2 * self.expected[role]:
            return False
        if role in CONTENT:
            if self.masses[f"{role}_alone"] < APART * mass:
                return False
            offset = self.lookalike(role)
            if offset is not None and self.elsewhere[role][offset] >= SHARE:
                return False
        if role == "duplicate_token":  # matching the own token also finds the query itself
            return mass >= SINK_SHARE and mass + self.together[role]["self"] >= SHARE
        return mass >= (SINK_SHARE if role == "sink" else SHARE)

    def lookalike(self, role: str) -> str | None:
        """Return the offset behind a content role's mass on its rows, or None.

        This occurs in periodic text. Other rows then decide between the two; without other rows,
        the content role is named, and the offset in its evidence.
        """
        by_offset = self.overlap[role]
        offset = max(by_offset, key=lambda name: by_offset[name])
        rest = self.masses[f"{role}_alone"] - by_offset[offset]
        return offset if rest < APART * self.masses[role] else None

    def is_part_of(self, offset: str, content: str) -> bool:
        """Return whether a content role explains an offset's mass, as in periodic text."""
        covered = self.overlap[content].get(offset, 0.0)
        return covered > self.together[content][offset] / 2

    def is_band(self) -> bool:
        """Return whether the mass of ``local`` is spread over the band."""
        on_band = self.together["local"]
        largest = max(on_band[name] for name in self.offsets)
        rest = on_band["local"] - largest
        return self.holds("local") and rest >= max(REST_OF_BAND, self.expected["local"])

    def shares_band(self, role: str) -> bool:
        """Return whether another offset of the band is large too."""
        others = [self.masses[name] for name in self.offsets if name != role]
        return role in self.offsets and max(others, default=0.0) >= SINK_SHARE

    def compete(self, one: str, other: str) -> bool:
        """Return whether two roles share the same rows."""
        if {one, other} == {"duplicate_token", "self"} or self.rows[one] < LEAST_ROWS:
            return False
        first = self.together[one]
        masses = [first[f"{r}_alone" if r in CONTENT else r] for r in (one, other)]
        if one in CONTENT and other in self.offsets:
            masses = [mass - self.overlap[one][other] for mass in masses]
        if min(masses) < SINK_SHARE:
            return False
        if not {one, other} <= set(self.offsets):
            return True
        in_band = any(name.startswith("offset_") for name in (one, other))
        return not in_band and sum(masses) >= TOGETHER  # else they are parts of ``local``


def head_roles(layer: str, sums: RoleMasses) -> list[HeadRole]:
    """Decide on the roles of a layer's heads.

    Args:
        layer: the layer's name.
        sums: the measured masses.

    Returns:
        At least one role per head if enough rows see enough keys, else none; the most specific role
        of a head first.

    Example:
        >>> import torch
        >>> from stabmon.operator import attention_operator
        >>> from stabmon.analysis.patterns.layer_scan import scan_layer
        >>> key = torch.eye(40)[None, None]
        >>> query = 30 * key.roll(1, dims=2)  # query i matches key i - 1
        >>> attention = attention_operator(query, key, scale=1.0, is_causal=True)
        >>> found = scan_layer(attention, valid=torch.ones(1, 40, dtype=torch.bool))
        >>> [role.role for role in head_roles("h.0", found.roles)]
        ['previous_token']
    """
    roles = []
    for head in range(sums.together.shape[-1]):
        if int(sums.counted[head]) < LEAST_ROWS:
            continue
        roles += _roles_of(layer, head, sums)
    return roles


def _roles_of(layer: str, head: int, sums: RoleMasses) -> list[HeadRole]:
    one = _means(head, sums)
    names = [name for name in sums.names if not name.endswith("_alone") or name[:-6] not in CONTENT]
    singles = [name for name in names if name != "local"]
    effective = float(sums.spread[head] / sums.counted[head])
    shared = {
        "least_visible": sums.least,
        "masses": {n: one.masses[n] for n in names},
        "all_expected": {n: one.expected[n] for n in names},
        "all_rows": {n: one.rows[n] for n in names},
        "effective_share": effective,
        "not_testable": _untestable(one, sums, names),
    }

    def made(role: str, **evidence: Any) -> HeadRole:
        share = SINK_SHARE if role == "sink" else SHARE
        known: dict[str, Any] = {
            "mass": one.masses.get(role),
            "expected": one.expected.get(role),
            "rows": one.rows.get(role),
            "share": share,
        }
        if role in CONTENT and (offset := one.lookalike(role)) is not None:
            known["indistinguishable_from"] = offset
        return HeadRole(layer, head, role, {**known, **evidence, **shared})

    between = _rivals(one, [name for name in singles if name not in sums.function_names])
    excluded = {name for pair in between for name in pair}
    held = [name for name in singles if one.holds(name) and name not in excluded]
    custom = [name for name in held if name in sums.function_names]
    held = [name for name in held if name not in custom]
    if "duplicate_token" in held:
        held = [name for name in held if name != "self"]
    for content in set(held) & set(CONTENT):
        held = [name for name in held if not one.is_part_of(name, content)]
    alone = [name for name in held if not one.shares_band(name)]
    if "local" in names and not excluded and "duplicate_token" not in held and one.is_band():
        if min(one.masses["sink"], one.together["local"]["sink"]) >= SINK_SHARE:
            between.append(("local", "sink"))
            held = [name for name in held if name != "sink"]
        else:
            held = [*alone, "local"]
    else:
        held = alone
    held.sort(key=lambda name: (name not in CONTENT, name == "sink"))
    rows = int(sums.counted[head])
    named = [made(name) for name in [*held, *custom]]
    if between:
        pair = between[0]
        best = max(one.masses[name] for name in pair)
        return [*named, made("mixed", mass=best, rows=rows, share=SINK_SHARE, between=list(pair))]
    if held:
        return named
    if effective >= EVENLY:
        return [*named, made("uniform", mass=effective, expected=1.0, rows=rows, share=EVENLY)]
    if custom:
        return named
    known = [one.masses[n] for n in names if one.rows[n] >= LEAST_ROWS]
    return [made("mixed", mass=max(known, default=0.0), rows=rows, between=None)]


def _untestable(one: _Head, sums: RoleMasses, names: Sequence[str]) -> dict[str, str]:
    """Return the reasons of roles not testable on this text and batch, by role."""
    asked = [name for name in names if not name.startswith("offset_")]
    if not sums.is_cross:
        asked = list(dict.fromkeys([*asked, *CONTENT]))
    found = {}
    for name in asked:
        if one.rows.get(name, 0) < LEAST_ROWS:
            no_ids = sums.ids is None and name in CONTENT
            found[name] = (
                "the batch has no token ids" if no_ids else NOT_TESTABLE.get(name, TOO_FEW)
            )
    if "local" in asked and sums.longest < LEAST_VISIBLE:
        found["local"] = f"a quarter of {sums.longest} keys is too narrow a band to test"
    return found


def _rivals(one: _Head, names: Sequence[str]) -> list[tuple[str, str]]:
    """Return pairs of roles on the same rows, counted on the rows of the rarer one."""
    pairs = []
    for place, first in enumerate(names):
        for second in names[place + 1 :]:
            content = [name for name in (first, second) if name in CONTENT]
            rarer, other = sorted((first, second), key=lambda name: one.rows[name])
            enough = 4 * one.rows[rarer] >= one.rows[other]
            asked = content or [rarer if enough else other]
            others = [second if name == first else first for name in asked]
            if any(one.compete(a, b) for a, b in zip(asked, others, strict=True)):
                pairs.append((first, second))
    return pairs


def _means(head: int, sums: RoleMasses) -> _Head:
    names = sums.names
    rows = [int(n) for n in sums.rows[:, head]]
    together = (sums.together[:, :, head] / sums.rows[:, head, None].clamp(min=1)).tolist()
    content = list(sums.overlap)
    expected = (sums.expected[:, head] / sums.rows[:, head].clamp(min=1)).tolist()
    return _Head(
        {name: together[i][i] for i, name in enumerate(names)},
        dict(zip(names, expected, strict=True)),
        dict(zip(names, rows, strict=True)),
        {a: dict(zip(names, together[i], strict=True)) for i, a in enumerate(names)},
        tuple(sums.offset_names),
        {n: dict(zip(sums.offset_names, _ratio(sums, n, head)[0], strict=True)) for n in content},
        {n: dict(zip(sums.offset_names, _ratio(sums, n, head)[1], strict=True)) for n in content},
    )


def _ratio(sums: RoleMasses, role: str, head: int) -> tuple[list[float], list[float]]:
    """Return each offset key's mean mass on a content role's rows, and elsewhere."""
    places = [sums.names.index(name) for name in sums.offset_names]
    both, count = sums.overlap[role][:, head], sums.coincide[role][:, head]
    rows = sums.rows[places, head] - count
    rest = sums.together[places, places, head] - both
    other = torch.where(rows >= LEAST_ROWS, rest / rows.clamp(min=1), torch.nan)
    mean = both / sums.rows[sums.names.index(role), head].clamp(min=1)
    return mean.tolist(), other.tolist()
