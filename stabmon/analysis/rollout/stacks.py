"""Stacks of layers over one sequence of tokens, found from a forward's calls."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

from torch import nn

from stabmon.capture.callers import attends_itself
from stabmon.capture.names import ModuleNames
from stabmon.model_names import CROSS_ATTENTION, TOWER
from stabmon.records import AttentionCall

NUMBERED = re.compile(r"^\D*\d+$")
"""``0`` in ``layers.0``, ``block1``."""

CallKind = Literal["self", "cross"]


@dataclass(frozen=True)
class SeenCall:
    """One attention call of a forward, without its tensors."""

    layer: str
    """Name of the layer, as captured."""
    kind: CallKind
    """``self``: keys are the queries' own tokens. ``cross``: another sequence's."""
    prefix: str
    """Qualified name of the layer's list of blocks; empty for the model itself."""
    batch: int
    queries: int
    keys: int
    is_self: bool = False
    """True if each query is known to be of the same token as a key.

    Hidden keys then show padding.
    """


@dataclass
class Stack:
    """Consecutive layers with attention over one sequence of tokens."""

    name: str
    """Name to distinguish the model's stacks, such as ``encoder`` or ``text_model``.

    The blocks' own name for a single stack.
    """
    prefix: str
    tokens: int
    layers: list[str] = field(default_factory=list)
    """Self-attention layers in the order of the forward."""
    cross: list[str] = field(default_factory=list)
    """Cross-attention layers of the same blocks."""
    cross_keys: int | None = None


Chosen = tuple[Stack, Stack | None]
"""A stack, and its encoder if the two are joined."""


class CallReader:
    """Reader of the attention calls of one forward while it runs.

    Args:
        model: the model; its modules give the layers their names.
    """

    def __init__(self, model: nn.Module) -> None:
        self._names = ModuleNames(model)
        self._first_of_block: dict[str, str] = {}

    def describe(self, call: AttentionCall) -> SeenCall:
        """Describe a call; use it while the attending module's forward runs."""
        sides = call.scores if call.scores is not None else call.query
        assert sides is not None
        batch, queries = sides.shape[0], sides.shape[2]
        side = call.scores if call.scores is not None else call.key
        assert side is not None
        keys = side.shape[3 if call.scores is not None else 2]
        name = call.layer.split("#")[0]
        prefix, tail, block = split_name(name)
        first = self._first_of_block.setdefault(block, name)
        is_second = first != name and block != prefix
        kind = self._kind(
            call, tail, queries, keys, is_second=is_second, is_numbered=block != prefix
        )
        return SeenCall(call.layer, kind, prefix, batch, queries, keys, call.is_self)

    def _kind(
        self,
        call: AttentionCall,
        tail: str,
        queries: int,
        keys: int,
        *,
        is_second: bool,
        is_numbered: bool,
    ) -> CallKind:
        """Return whether a call's keys are the queries' own tokens or another sequence's.

        Keys of another number than the queries are another sequence's, except in a block's first
        attention: there they are merged or cached.
        """
        says = getattr(call.module, "is_cross_attention", None)
        if says is True or CROSS_ATTENTION.search(tail):
            return "cross"
        if keys != queries:
            return "cross" if is_second or not is_numbered else "self"
        if says is False or not is_second or call.module is None or call.is_self:
            return "self"
        return "self" if attends_itself(call.module, self._names, queries, keys) else "cross"


def split_name(name: str) -> tuple[str, str, str]:
    """Return the blocks' name, the name within a block, and the block's own name.

    Example:
        >>> split_name("decoder.block.3.layer.1.EncDecAttention")
        ('decoder.block', 'layer.1.EncDecAttention', 'decoder.block.3')
        >>> split_name("first.attention")
        ('', 'first.attention', '')
        >>> split_name("h.0")
        ('h', '', 'h.0')
    """
    parts = name.split(".")
    for at, part in enumerate(parts):
        if NUMBERED.match(part):
            stem = part.rstrip("0123456789")
            prefix = ".".join(parts[:at] + ([stem] if stem else []))
            return prefix, ".".join(parts[at + 1 :]), ".".join(parts[: at + 1])
    for at, part in enumerate(parts[:-1]):
        if TOWER.search(part):
            return ".".join(parts[: at + 1]), ".".join(parts[at + 1 :]), ".".join(parts[: at + 1])
    return "", name, ""


def stacks_of(calls: Sequence[SeenCall]) -> list[Stack]:
    """Return the stacks of a forward, in the order of their first attention.

    Args:
        calls: all attention calls, in order.

    Example:
        >>> calls = [
        ...     SeenCall(f"{part}.layers.{i}.attn", "self", f"{part}.layers", 1, 4, 4)
        ...     for part in ("text", "image") for i in (0, 1)
        ... ]
        >>> [(stack.name, len(stack.layers)) for stack in stacks_of(calls)]
        [('text', 2), ('image', 2)]
    """
    found: dict[str, Stack] = {}
    for call in calls:
        stack = found.setdefault(call.prefix, Stack("", call.prefix, call.queries))
        if call.kind == "self":
            stack.layers.append(call.layer)
            stack.tokens = call.queries
        else:
            stack.cross.append(call.layer)
            stack.cross_keys = call.keys
    stacks = [stack for stack in found.values() if stack.layers]
    for stack, name in zip(stacks, distinct_names([stack.prefix for stack in stacks]), strict=True):
        stack.name = name
    return stacks


def distinct_names(prefixes: Sequence[str]) -> list[str]:
    """Return for each qualified name its first distinctive part, else the whole name.

    Args:
        prefixes: qualified names of lists of blocks.

    Example:
        >>> distinct_names(["model.encoder.layers", "model.decoder.layers"])
        ['encoder', 'decoder']
        >>> distinct_names(["transformer.h"])
        ['transformer.h']
    """
    split = [prefix.split(".") for prefix in prefixes]
    shared = 0
    while len(prefixes) > 1 and len({tuple(parts[: shared + 1]) for parts in split}) == 1:
        shared += 1
    own = [parts[shared] if shared < len(parts) else "" for parts in split]
    return [
        part if len(prefixes) > 1 and part and own.count(part) == 1 else prefix or "model"
        for part, prefix in zip(own, prefixes, strict=True)
    ]


def choose_stack(stacks: Sequence[Stack], wanted: str) -> Stack:
    """Return the stack with the wanted name.

    Args:
        stacks: all stacks of a forward.
        wanted: a stack's name, the blocks' qualified name, or a part of that; ``encoder`` and
            ``decoder`` also stand for a stack that is attended across to, and the attending one.

    Raises:
        ValueError: listing the stacks, if none or several fit.
    """
    for fits in (
        [s for s in stacks if wanted in (s.name, s.prefix)],
        [s for s in stacks if wanted in s.prefix.split(".")],
        [s for s in stacks if wanted == role_of(s, stacks)],
    ):
        if len(fits) == 1:
            return fits[0]
    raise ValueError(
        f"stack {wanted!r} is none of the model's stacks of layers, or fits several: "
        f"{listed(stacks)}"
    )


def choose(calls: Sequence[SeenCall], wanted: str) -> Chosen | None:
    """Return the wanted stack, and its encoder for ``joined``; None for ``all``.

    Args:
        calls: all attention calls of a forward.
        wanted: a stack's name, ``joined`` or ``all``.

    Raises:
        ValueError: listing the stacks, if there is none of that name.
    """
    if wanted == "all":
        return None
    stacks = stacks_of(calls)
    if wanted != "joined":
        return choose_stack(stacks, wanted), None
    decoders = [each for each in stacks if role_of(each, stacks) == "decoder"]
    encoder = encoder_of(decoders[-1], stacks) if decoders else None
    if encoder is None:
        raise ValueError(
            "stack 'joined' needs an encoder and a decoder that attends to it in one forward; "
            f"found {listed(stacks)}"
        )
    return decoders[-1], encoder


def role_of(stack: Stack, stacks: Sequence[Stack]) -> str | None:
    """Return ``decoder`` for a stack with cross attention, ``encoder`` for its source.

    None for other stacks.

    Args:
        stack: the stack.
        stacks: all stacks of the forward.
    """
    if stack.cross:
        return "decoder"
    decoders = [other for other in stacks if other.cross]
    return "encoder" if any(encoder_of(each, stacks) == stack for each in decoders) else None


def encoder_of(decoder: Stack, stacks: Sequence[Stack]) -> Stack | None:
    """Return the source of a decoder's cross attention, or None.

    It is the last stack before it over as many tokens as its cross attention has keys.

    Args:
        decoder: a stack with cross attention.
        stacks: all stacks of the forward.
    """
    before = [each for each in stacks[: list(stacks).index(decoder)] if not each.cross]
    fitting = [each for each in before if each.tokens == decoder.cross_keys]
    return fitting[-1] if fitting else None


def listed(stacks: Sequence[Stack]) -> str:
    """Return the stacks' names and numbers of layers as a phrase."""
    return ", ".join(
        f"{s.name} ({len(s.layers)} layer{'s' * (len(s.layers) != 1)})" for s in stacks
    )
