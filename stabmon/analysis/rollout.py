"""Attention rollout of any model, in the memory of its result."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn

from stabmon.analysis.chunks import in_chunks
from stabmon.analysis.forward import run_model
from stabmon.analysis.given_maps import given_layers, is_given
from stabmon.analysis.image_grid import image_grid
from stabmon.analysis.mixing import FUSIONS, HeadFusion, Look, call_maps
from stabmon.analysis.paths import DownPath, Layer, Part, UpPath
from stabmon.analysis.positions import Positions, Wanted
from stabmon.analysis.rollout_result import Rollout
from stabmon.analysis.stacks import CallReader, SeenCall, Stack, choose_stack, encoder_of, listed, role_of, stacks_of
from stabmon.records import AttentionCall

logger = logging.getLogger("stabmon")

_told: WeakSet[nn.Module] = WeakSet()
"""Models whose choice of a stack has been reported."""
Objective = Callable[[Any], Tensor] | int | Tensor
LookMaker = Callable[[str, int, Tensor], Look]


@dataclass(frozen=True, eq=False)
class Settings:
    """How a rollout is made."""

    residual: float = 0.5
    start_layer: int = 0
    head_fusion: HeadFusion = "mean"
    targets: Positions | None = None
    sources: Positions | None = None
    stack: str | None = None
    pattern: str | None = None
    attention_modules: tuple[str, ...] = ()

    def part(self, start: int) -> Settings:
        """Return the settings of a part of the batch that begins with sample ``start``."""
        targets, sources = (None if each is None else each.beginning(start) for each in (self.targets, self.sources))
        return replace(self, targets=targets, sources=sources)

    def path(self) -> UpPath | DownPath:
        """Return the cheaper way through the layers."""
        if self.targets is not None and self.sources is None:
            return DownPath(self.head_fusion, self.residual)
        return UpPath(self.head_fusion, self.residual, self.sources)


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

    R_l = M_l R_{l-1}, R_0 = I, with M_l = (residual I + (1 - residual) A_l) / row sum and A_l the layer's attention, its heads
    fused; the later layer multiplies from the left, and the first layer has a residual like the others. Where the rows of A_l sum
    to 1 and residual is 1/2 this is (A_l + I) / 2, Abnar and Zuidema's. Rows of maxima and minima, and those beside a learned sink,
    sum to something else and are normalised. A row that sees nothing becomes the identity's.

    The full matrix is made during the forward and nothing is kept of a layer, so that beside the result (B S^2 numbers) there is one
    block of rows. With ``targets`` the queries and keys of all layers are kept and vectors walk down: linear in S. With ``sources``
    vectors walk up and nothing is kept. No map of a head is ever held.

    Args:
        model: any model whose attention is seen (``docs/capture.md``); or a list of maps, first layer first, each
            ``[B, H, S, S]``, ``[B, S, S]`` with the heads fused, or ``[S, S]``.
        batch: the model's input, as in :func:`stabmon.analysis.forward.run_model`.
        targets: rows to compute: a position, several, or ``[B, n]``. Negative ones count from the end of the sample's own tokens.
        sources: columns to compute, likewise: what those tokens reach.
        residual: weight of the residual path, in [0, 1).
        start_layer: the first layer that counts, from 0.
        head_fusion: ``mean``, ``max`` or ``min`` over the heads.
        weighting: ``gradient`` weights A by relu of its gradient, entry by entry: see
            :mod:`stabmon.analysis.gradient_rollout`.
        objective: with ``gradient``: what is differentiated. A class or token id, ``[B]`` of them, or a function of the model's output
            that returns a number; None for the log-probability of the model's own top class, or of its top token at the
            last target (at the last token without targets).
        stack: which stack of a model with several: its name, or ``joined`` for an encoder and its decoder (below), or ``all`` for
            every self-attention layer in the order of the forward. None for the one that attends last.
        attention_layer_pattern: regular expression that a layer's name must contain; it selects before ``start_layer``.
        attention_modules: ``fnmatch`` patterns of modules whose hand-written softmax is attention, where that is not found.
        chunk_size: samples in one forward; None for all. Halved when memory runs out.

    ``joined`` is our own: the rollout over the tokens of both stacks, where a cross-attention layer mixes as a self-attention layer
    does, so that R = sum_l w_l R_dec(after l) C_l R_enc, w_l the residual's share; rows are normalised over the encoder's tokens.

    Returns:
        The rollout: ``matrix [B, T, S]``, float32 (float64 of a float64 model), rows sum to 1. NaN where the model is NaN.

    Raises:
        ValueError: if nothing attends, a pattern, stack, position or number does not fit, or tokens are merged or regrouped between
            layers (windows), which no rollout describes.

    Example:
        >>> model = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, batch_first=True), 3)
        >>> rollout = attention_rollout(model, torch.randn(2, 5, 8))
        >>> rollout.matrix.shape, bool(torch.allclose(rollout.matrix.sum(-1), torch.ones(2, 5)))
        (torch.Size([2, 5, 5]), True)
        >>> attention_rollout([torch.eye(4), torch.full((4, 4), 0.25)], targets=-1).matrix
        tensor([[[0.1250, 0.1250, 0.1250, 0.6250]]])

    References:
        Abnar and Zuidema 2020, Quantifying Attention Flow in Transformers. Chefer et al. 2021, Generic Attention-model
        Explainability.
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
        raise ValueError(f"weighting {weighting!r}: use None or 'gradient'")
    if weighting is None and objective is not None:
        raise ValueError("objective is given and weighting is None: use weighting='gradient'")
    if is_given(model):
        if batch is not None or weighting or stack or attention_layer_pattern:
            raise ValueError("given maps take no batch, weighting, stack or attention_layer_pattern: give the model for these")
        return roll_given(list(model), settings)  # type: ignore[arg-type]
    if not isinstance(model, nn.Module):
        raise ValueError(f"model is a {type(model).__name__}: give a torch.nn.Module, or a list of attention maps")
    return roll_model(model, batch, settings, weighting=weighting, objective=objective, chunk_size=chunk_size)


def roll_model(
    model: nn.Module,
    batch: Any,
    settings: Settings,
    *,
    weighting: str | None = None,
    objective: Objective | None = None,
    chunk_size: int | None = None,
    look: LookMaker | None = None,
) -> Rollout:
    """Return the rollout of a model, in chunks where memory asks for it.

    Args:
        model, batch, weighting, objective, chunk_size: see :func:`attention_rollout`.
        settings: the rest.
        look: is asked for what looks at the weights of a sample's layer: ``(layer, sample, valid rows)``.
    """

    def run(part: Any, start: int) -> Rollout:
        mine = settings.part(start)
        shifted = None if look is None else lambda layer, index, valid: look(layer, index + start, valid)
        if weighting is not None:
            from stabmon.analysis.gradient_rollout import roll_gradient

            return roll_gradient(model, part, mine, objective)
        return roll_forward(model, part, mine, shifted)

    return in_chunks(batch, run, merge_rollouts, chunk_size, dim=sample_dimension(model))


def roll_forward(model: nn.Module, batch: Any, settings: Settings, look: LookMaker | None) -> Rollout:
    """Return the rollout of one forward."""
    chosen = None if settings.stack is None else scan(model, batch, settings)
    walk = Walk(model, settings, chosen, batch_sizes(batch))

    def on_call(call: AttentionCall) -> None:
        seen = walk.reader.describe(call)
        part = walk.part_of(seen)
        if part is not None:
            walk.take(layer_of(seen, part, call, keep=isinstance(walk.path, DownPath)), look)

    run_model(model, batch, on_call, pattern=settings.pattern, attention_modules=settings.attention_modules)
    return walk.finish(batch)


def roll_given(maps: Sequence[Any], settings: Settings) -> Rollout:
    """Return the rollout of given maps."""
    path, layers = settings.path(), list(given_layers(maps))
    check_start(settings.start_layer, [layer.name for layer in layers])
    for layer in layers[settings.start_layer :]:
        path.add(layer)
    return finish_path(path, settings)


def scan(model: nn.Module, batch: Any, settings: Settings) -> tuple[Stack, Stack | None] | None:
    """Return the stack that is wanted, and its encoder where they are to be joined; None for all layers.

    One more forward, in which nothing is computed of attention.
    """
    if settings.stack == "all":
        return None
    reader, seen = CallReader(model), list[SeenCall]()
    run_model(
        model,
        batch,
        lambda call: seen.append(reader.describe(call)),
        pattern=settings.pattern,
        attention_modules=settings.attention_modules,
    )
    stacks = stacks_of(seen)
    assert settings.stack is not None
    if settings.stack != "joined":
        return choose_stack(stacks, settings.stack), None
    decoders = [each for each in stacks if role_of(each, stacks) == "decoder"]
    encoder = encoder_of(decoders[-1], stacks) if decoders else None
    if encoder is None:
        raise ValueError(f"stack 'joined' needs an encoder and a decoder that attends to it in one forward; found {listed(stacks)}")
    return decoders[-1], encoder


class Walk:
    """One path through the layers of one stack, chosen while the forward runs.

    Args:
        model: the model.
        settings: how the rollout is made.
        chosen: the stack and its encoder, as :func:`scan` found them; None for the stack that attends last, or for all.
        batches: numbers of samples that the batch can have.
    """

    def __init__(
        self, model: nn.Module, settings: Settings, chosen: tuple[Stack, Stack | None] | None, batches: frozenset[int]
    ) -> None:
        self.model, self.settings, self.chosen, self.batches = model, settings, chosen, batches
        self.reader = CallReader(model)
        self.path = settings.path()
        self.seen: list[SeenCall] = []
        self._prefix: str | None = None
        self._left: set[str] = set()
        self._count: dict[Part, int] = {"self": 0, "encoder": 0}

    def part_of(self, call: SeenCall) -> Part | None:
        """Return what part a call has in the rollout; None for none."""
        self.seen.append(call)
        stack, encoder = self.chosen or (None, None)
        if call.kind == "cross":
            return "cross" if encoder is not None and stack is not None and call.layer in stack.cross else None
        if stack is not None:
            if encoder is not None and call.layer in encoder.layers:
                return "encoder"
            return "self" if call.layer in stack.layers else None
        if self.settings.stack is None:
            self._follow(call)
        return "self"

    def _follow(self, call: SeenCall) -> None:
        """Begin anew with another stack's first layer."""
        if call.prefix == self._prefix:
            return
        if call.prefix in self._left:
            raise ValueError(f"stacks take turns: choose one of them by stack=: {listed(stacks_of(self.seen))}")
        if self._prefix is not None:
            self._left.add(self._prefix)
            self.path, self._count = self.settings.path(), {"self": 0, "encoder": 0}
        self._prefix = call.prefix

    def take(self, layer: Layer, look: LookMaker | None) -> None:
        """Walk through a layer, unless it lies before ``start_layer``.

        Raises:
            ValueError: if it attends over another batch than the input's.
        """
        if layer.batch not in self.batches:
            raise ValueError(
                f"{layer.name} attends within {layer.batch} groups of {layer.queries} tokens, and the batch has "
                f"{min(self.batches)} samples: windows have no rollout; name layers over whole samples by attention_layer_pattern"
            )
        if layer.part == "cross":
            if self._count["self"] <= self.settings.start_layer and self.settings.start_layer:
                return
        else:
            self._count[layer.part] += 1
            if self._count[layer.part] <= self.settings.start_layer:
                return
        self.path.add(layer, look)

    def finish(self, batch: Any) -> Rollout:
        """Return the rollout, and say which stack it is of where there are several."""
        stacks = stacks_of(self.seen)
        mine = self._mine(stacks)
        check_start(self.settings.start_layer, mine.layers if self.chosen is not None or mine.layers else self.path.layers)
        rollout = finish_path(self.path, self.settings)
        name = mine.name if self.settings.stack not in ("joined", "all") else str(self.settings.stack)
        if self.settings.stack is None and len(stacks) > 1 and self.model not in _told:
            _told.add(self.model)
            logger.warning(
                "%s has the stacks %s: the rollout is of %s, which attends last; choose another by stack=",
                type(self.model).__name__,
                listed(stacks),
                name,
            )
        columns = self.chosen[1] if self.chosen is not None and self.chosen[1] is not None else mine
        grid = image_grid(self.model, batch, columns.tokens, columns.name if len(stacks) > 1 else None)
        return replace(rollout, stack=name, stacks=tuple(each.name for each in stacks), image_grid=grid)

    def _mine(self, stacks: Sequence[Stack]) -> Stack:
        if self.chosen is not None:
            return self.chosen[0]
        if not stacks:
            layers = ", ".join(call.layer for call in self.seen)
            raise ValueError(f"only cross attention was found ({layers}): rollout needs layers that attend over their own tokens")
        if self.settings.stack == "all":
            return Stack("all", "", stacks[-1].tokens, [layer for each in stacks for layer in each.layers])
        return next(each for each in stacks if each.prefix == self._prefix)


def layer_of(seen: SeenCall, part: Part, call: AttentionCall, *, keep: bool) -> Layer:
    """Return a call as a layer; with ``keep`` it holds copies, as the call's own tensors die with the forward."""
    if keep:
        query, key = (None if each is None else each.detach().clone() for each in (call.query, call.key))
        scores = None if call.scores is None else call.scores.detach().clone()
        call = replace(call, query=query, key=key, scores=scores, module=None)
    tensor = call.scores if call.scores is not None else call.query
    assert tensor is not None
    dtype = torch.float64 if tensor.dtype == torch.float64 else torch.float32
    return Layer(
        seen.layer, part, seen.batch, seen.queries, seen.keys, lambda index: call_maps(call, index), tensor.device, dtype
    )


def finish_path(path: UpPath | DownPath, settings: Settings) -> Rollout:
    """Return the rollout at the end of a path."""
    assert path.valid is not None
    sources: Tensor | None = None
    targets: Tensor | None = None
    if isinstance(path, DownPath):
        assert settings.targets is not None
        settings.targets.check(len(path.valid))
        matrix, first, targets = path.finish(settings.targets)
    else:
        if settings.sources is not None:
            settings.sources.check(len(path.valid))
        matrix, first = path.finish()
        sources = path.sources
        if settings.targets is not None:
            settings.targets.check(len(path.valid))
            targets = torch.stack([settings.targets.of(index, row) for index, row in enumerate(path.valid)])
            matrix = matrix.gather(1, targets[..., None].expand(-1, -1, matrix.shape[2]))
            first = first.gather(1, targets)
    return Rollout(
        matrix,
        targets,
        first,
        path.valid,
        path.valid if path.source_valid is None else path.source_valid,
        sources,
        tuple(path.layers),
        residual=settings.residual,
        start_layer=settings.start_layer,
        head_fusion=settings.head_fusion,
    )


def merge_rollouts(parts: Sequence[Rollout]) -> Rollout:
    """Return the rollout of a batch whose parts were rolled out one after the other."""
    first = parts[0]
    if len(parts) == 1:
        return first

    def joined(name: str) -> Tensor | None:
        tensors = [getattr(each, name) for each in parts]
        return None if tensors[0] is None else torch.cat(tensors)

    names = ("matrix", "targets", "first_token_share", "valid", "source_valid", "sources")
    return replace(first, **{name: joined(name) for name in names})


def batch_sizes(batch: Any) -> frozenset[int]:
    """Return the numbers of samples that a batch can have; the second dimension of ``[S, B, C]`` is one."""
    values = [batch] if isinstance(batch, Tensor) else list(batch.values() if hasattr(batch, "values") else batch)
    tensors = [each for each in values if isinstance(each, Tensor) and each.ndim]
    first = {each.shape[0] for each in tensors if each.ndim > 1}
    return frozenset(first | {each.shape[1] for each in tensors if each.ndim == 3} | {1})


def sample_dimension(model: nn.Module) -> int:
    """Return the dimension of the samples in a tensor of three: 1 for torch's own attention over ``[S, B, C]``."""
    first = next((m for m in model.modules() if isinstance(m, nn.MultiheadAttention)), None)
    return 1 if first is not None and not first.batch_first else 0


def check_residual(residual: float) -> float:
    """Return the weight, or raise ``ValueError`` where it is none."""
    if not 0 <= residual < 1:
        raise ValueError(f"residual {residual!r}: give a weight from 0 up to, not including, 1")
    return float(residual)


def check_fusion(fusion: HeadFusion) -> HeadFusion:
    """Return the fusion, or raise ``ValueError`` where there is none of that name."""
    if fusion not in FUSIONS:
        raise ValueError(f"head_fusion {fusion!r}: use mean, max or min")
    return fusion


def check_start(start_layer: int, layers: Sequence[str]) -> None:
    """Raise ``ValueError`` where there is no such layer."""
    if not 0 <= start_layer < len(layers):
        raise ValueError(f"start_layer {start_layer!r}: there are {len(layers)} layers, 0 to {len(layers) - 1}: {', '.join(layers)}")
