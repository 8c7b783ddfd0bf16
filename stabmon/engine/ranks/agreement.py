"""Agree with the other ranks on the names, heads and numbers that are exchanged."""

from __future__ import annotations

import hashlib
import json
import logging
from dataclasses import asdict

from torch import nn

from stabmon._torch.forward_call import is_split
from stabmon._torch.process_group import default_store, rank, world_size
from stabmon._torch.ranks.exchange import RankExchange
from stabmon._torch.ranks.identity import (
    gathered_dims,
    has_split_heads,
    head_shard,
    mesh_ranks,
    weights_digest,
)
from stabmon._torch.ranks.share import RankShare
from stabmon.engine.ranks.merge import GROUP, Agreement, Held, Layout, merge
from stabmon.engine.ranks.offer import LARGEST, SQUARES, Offer, entries_of, kind_of, layout_of
from stabmon.records import LayerInfo
from stabmon.signals import SIGNALS

logger = logging.getLogger("stabmon")

_PATIENCE = 3
"""Samples for which ranks wait for one that has measured nothing, before it counts as without."""


class ModelAgreement:
    """Comparison of the models of all ranks, and what they agree on.

    Args:
        model: the model of this rank.
        exchange: with the other ranks.
        stage: the pipeline stage that this rank is, from 0; None to find out.
    """

    def __init__(self, model: nn.Module, exchange: RankExchange, stage: int | None) -> None:
        self.exchange, self._model, self._stage = exchange, model, stage
        self.facts: dict[str, LayerInfo] = {}
        """Facts about all layers, of all heads, where ranks hold different ones."""
        self.givers: dict[str, int] = {}
        """Number of ranks that give each key of numbers to be added; all where it is missing."""
        self.scale = 1.0
        """Ranks over ranks of this stage, by which numbers to be added are multiplied."""
        self._attempts = 0

    def common_layout(self, own: Offer) -> Layout | None:
        """Return what is exchanged; None where it is too early to know."""
        exchange, entries = self.exchange, layout_of(entries_of(own))
        self._attempts += 1
        mesh = mesh_ranks(self._model)
        apart = has_split_heads(self._model) or 1 < len(mesh) < world_size()
        apart = apart or self._stage is not None
        digest, identity = float(_digest(repr(entries))), float(weights_digest(self._model))
        given = [digest, -digest, identity, -identity, float(apart), float(is_split(self._model))]
        is_early = not entries and self._attempts <= _PATIENCE
        found = exchange.meet("models", [float(is_early), *given])
        if found[0]:
            return None  # some rank has measured nothing yet
        is_same = found[3] == -found[4]
        exchange.are_replicas = is_same and not found[5] and not found[6]
        if not is_same or found[5]:
            return self._merged_layout(own, identity, mesh)
        exchange.share = RankShare()
        if found[1] != -found[2]:  # the same model, of which some rank measures less
            return [
                (str(layer), str(name), int(heads))
                for layer, name, heads in exchange.of_first(entries) or []
            ]
        return entries

    def _merged_layout(self, own: Offer, identity: float, mesh: list[int]) -> Layout:
        """Agree on common names for the layers and heads of all ranks, and return their entries.

        Rank 0 reads from the store what each rank holds, and sends what all of them hold together.

        Raises:
            RuntimeError: if there is no store, or some rank's description is missing there.
        """
        exchange, store = self.exchange, default_store()
        if store is None:
            raise RuntimeError("the process group has no store to describe models in")
        held, shards = self._held(own, identity, mesh)
        text = json.dumps(held.to_list())
        # replicas have the same text: rank 0 reads it once
        name, digest = f"{exchange.name}/model", str(_digest(text))
        store.set(f"{name}/{digest}", text)
        store.set(f"{name} of {rank()}", digest)
        exchange.meet("described")
        plain = None
        if rank() == 0:
            digests = [store.get(f"{name} of {each}").decode() for each in range(world_size())]
            texts = {each: json.loads(store.get(f"{name}/{each}")) for each in set(digests)}
            plain = asdict(merge([Held.of(texts[each]) for each in digests]))
        agreed = Agreement(**(exchange.of_first(plain) or {}))
        exchange.share = agreed.share_of(rank(), shards)
        self.facts = agreed.facts()
        self.givers = {key: givers for key, (_, givers) in agreed.added.items()}
        if agreed.is_staged:
            exchange.are_replicas = False
            stage = agreed.stage_of[rank()]
            self.scale = world_size() / list(agreed.stage_of).count(stage)
        if rank() == 0 and (words := agreed.words()):
            logger.warning("%s", words)
        added = [
            (key, LARGEST if kind_of(key) == GROUP else SQUARES, count)
            for key, (count, _) in agreed.added.items()
        ]
        signals = [(str(layer), str(name), int(heads)) for layer, name, heads in agreed.entries]
        return [each for each in signals if each[1] in SIGNALS] + added

    def _held(self, own: Offer, identity: float, mesh: list[int]) -> tuple[Held, dict[str, int]]:
        """Describe what this rank holds; also which shard of its heads, by layer."""
        gathered, layers, shards = gathered_dims(self._model), {}, {}
        for layer, signals in own.sums.items():
            if not signals or layer not in own.info:
                continue
            info, heads = own.info[layer], len(next(iter(signals.values())).total)
            module, shard = own.modules.get(layer), 0
            if module is not None:
                shard = head_shard(module, heads, info.head_dim, gathered)
            shards[layer] = shard
            layers[layer] = (shard, heads, list(signals), info.to_dict())
        numbers = {**own.whole, **own.squares, **own.groups}
        sums = {key: (kind_of(key), len(each)) for key, each in numbers.items()}
        values = weights_digest(self._model, parts=True)
        return Held(int(identity), values, mesh, self._stage, layers, sums), shards


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:6], "big")
