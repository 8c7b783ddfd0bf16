"""Merge what ranks hold into one model: stages of a pipeline, and shards of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from stabmon._torch.ranks.share import RankShare
from stabmon.records import LayerInfo

Layout = list[tuple[str, str, int]]
"""Layer, signal and number of heads of each entry of a vector."""
GROUP = "group of "
"""Kind of the numbers of a parameter group, of which ranks take the largest."""


@dataclass(frozen=True)
class Held:
    """Description of what one rank holds, by its own names; plain values, for JSON."""

    names: int
    """Digest of names, shapes and placements of the parameters, and of weights that are whole."""
    values: int
    """Digest of the bits of the weights here, parts of sharded ones included."""
    mesh: Sequence[int]
    """The ranks over which its parameters are sharded; itself alone where they are whole."""
    stage: int | None
    """The pipeline stage that it was said to be; None to find out."""
    layers: Mapping[str, tuple[int, int, Sequence[str], Mapping[str, Any]]]
    """Shard, heads here, signals, and facts as plain values, by layer."""
    sums: Mapping[str, tuple[str, int]]
    """Kind with its own name of a layer, and count, of numbers that are added, by their key.

    The key is the kind followed by the layer.
    """

    def to_list(self) -> list[Any]:
        """Return the fields as a list, for JSON."""
        return [self.names, self.values, list(self.mesh), self.stage, self.layers, self.sums]

    @classmethod
    def of(cls, fields: Sequence[Any]) -> Held:
        """Return the description that :meth:`to_list` has made a list of."""
        names, values, mesh, stage, layers, sums = fields
        return cls(int(names), int(values), mesh, stage, layers, sums)


@dataclass(frozen=True)
class Agreement:
    """Description of the whole run, the same on all ranks; plain values, for JSON."""

    prefixes: Sequence[str]
    """Prefix of each stage's layers; all empty where names are different already."""
    stage_of: Sequence[int]
    """The stage of each rank."""
    entries: Layout
    """The exchanged values, by common names; stages and layers in order."""
    added: Mapping[str, tuple[int, int]]
    """Count of each key of numbers that are added, and number of ranks that give it."""
    heads: Sequence[Mapping[str, tuple[int, Mapping[str, int]]]]
    """By stage and own name of a layer: heads in all, and the first head of each shard."""
    info: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Facts about each layer, by common names."""

    @property
    def is_staged(self) -> bool:
        """Return whether there is more than one stage."""
        return len(self.prefixes) > 1

    @property
    def layers(self) -> list[str]:
        """Common names of all layers, in order."""
        return list(dict.fromkeys(layer for layer, _, _ in self.entries))

    def share_of(self, rank: int, shards: Mapping[str, int]) -> RankShare:
        """Return what a rank holds.

        Args:
            rank: its number.
            shards: which shard of its heads it holds, by own name of a layer.
        """
        stage = self.stage_of[rank]
        prefix, own = self.prefixes[stage], self.heads[stage]
        here = {f"{prefix}{layer}" for layer in own}
        split = {
            layer: (firsts[str(shards.get(layer, 0))], total)
            for layer, (total, firsts) in own.items()
            if len(firsts) > 1
        }
        elsewhere = frozenset(layer for layer in self.layers if layer not in here)
        return RankShare(prefix, split, elsewhere, self.is_staged)

    def facts(self) -> dict[str, LayerInfo]:
        """Return the facts about each layer, of all its heads."""
        return {layer: LayerInfo.from_dict(each) for layer, each in self.info.items()}

    def words(self) -> str:
        """Say in one line what is named otherwise than in the ranks' own models; may be empty."""
        if not self.is_staged:
            return ""
        if not any(self.prefixes):
            return (
                f"stabmon: ranks hold {len(self.prefixes)} different parts of the model (pipeline "
                "stages); all are recorded, by rank 0"
            )
        first = [self.stage_of.index(stage) for stage in range(len(self.prefixes))]
        named = ", ".join(
            f"{prefix.rstrip('.')} (rank {rank})"
            for prefix, rank in list(zip(self.prefixes, first, strict=True))[:8]
        )
        return (
            "stabmon: ranks hold different weights under equal names; layers are told apart by a "
            f"prefix: {named}; give stage=... to the monitor to number pipeline stages otherwise"
        )


def merge(ranks: Sequence[Held]) -> Agreement:
    """Return one description of what all ranks hold.

    Ranks are replicas where names, shapes and placements are the same, and the bits of all weights
    or of all their parts. Other ranks are stages, numbered by their first rank where they were not
    numbered otherwise. Where two stages have layers of the same name, the layers of all get a prefix.

    Args:
        ranks: the descriptions, by rank.

    Example:
        >>> facts = {"heads": 2, "head_dim": 4, "scale": 0.5, "dtype": "float32"}
        >>> def held(values, shard):
        ...     return Held(1, values, [0], None, {"attn": (shard, 2, ["max_logit"], facts)}, {})
        >>> merge([held(5, 0), held(6, 0)]).entries
        [('stage0.attn', 'max_logit', 2), ('stage1.attn', 'max_logit', 2)]
        >>> merge([held(5, 0), held(5, 1)]).entries
        [('attn', 'max_logit', 4)]
    """
    found: dict[Any, int] = {}
    keys = [_key(each, ranks) for each in ranks]
    for key in sorted(dict.fromkeys(keys), key=lambda key: _order(key, keys)):
        found[key] = len(found)
    stage_of = [found[key] for key in keys]
    stages = [
        [each for each, stage in zip(ranks, stage_of, strict=True) if stage == number]
        for number in range(len(found))
    ]
    names = [{layer for each in stage for layer in each.layers} for stage in stages]
    is_equal = sum(map(len, names)) > len(set().union(*names))
    numbers = [
        stage[0].stage if stage[0].stage is not None else at for at, stage in enumerate(stages)
    ]
    if len(set(numbers)) < len(numbers):
        numbers = list(range(len(stages)))
    prefixes = [f"stage{number}." if is_equal else "" for number in numbers]
    entries: Layout = []
    heads: list[dict[str, tuple[int, dict[str, int]]]] = []
    info: dict[str, dict[str, Any]] = {}
    added: dict[str, tuple[int, int]] = {}
    for prefix, stage in zip(prefixes, stages, strict=True):
        heads.append({})
        for layer in dict.fromkeys(layer for each in stage for layer in each.layers):
            known = [each.layers[layer] for each in stage if layer in each.layers]
            total, firsts = _split(known)
            heads[-1][layer] = (total, firsts)
            info[f"{prefix}{layer}"] = {**known[0][3], "heads": total}
            signals = dict.fromkeys(name for each in known for name in each[2])
            entries += [(f"{prefix}{layer}", name, total) for name in signals]
        for each in stage:
            for kind_and_layer, (kind, count) in each.sums.items():
                key = common_key(kind_and_layer, kind, prefix)
                added[key] = (count, added.get(key, (0, 0))[1] + 1)
    return Agreement(prefixes, stage_of, entries, added, heads, info)


def common_key(key: str, kind: str, prefix: str) -> str:
    """Return the key of numbers by the common name of their layer; a group's is that of all ranks.

    Example:
        >>> common_key("gradient of attn", "gradient of ", "stage1.")
        'gradient of stage1.attn'
        >>> common_key("gradient of ", "gradient of ", "stage1.")
        'gradient of '
    """
    layer = key.removeprefix(kind)
    return f"{kind}{prefix}{layer}" if layer and kind != GROUP else key


def _key(held: Held, ranks: Sequence[Held]) -> Any:
    """Return what the ranks of a stage have in common, and of no other."""
    if held.stage is not None:
        return held.stage
    parts = tuple(ranks[at].values for at in held.mesh if at < len(ranks))
    return (held.names, parts if len(held.mesh) > 1 else (held.values,))


def _order(key: Any, keys: Sequence[Any]) -> tuple[bool, int]:
    return (not isinstance(key, int), key if isinstance(key, int) else keys.index(key))


def _split(known: Sequence[tuple[int, int, Sequence[str], Any]]) -> tuple[int, dict[str, int]]:
    """Return the heads of a layer in all, and the first head of each shard."""
    counts = dict(sorted((int(shard), int(heads)) for shard, heads, *_ in known))
    total, firsts = 0, {}
    for shard, heads in counts.items():
        firsts[str(shard)] = total
        total += heads
    return total, firsts
