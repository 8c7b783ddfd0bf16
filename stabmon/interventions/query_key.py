"""Which rows of which parameters make the query and the key of each head: H query heads, G of them to a key head, D head dimension.

Nothing here is known for certain: names and shapes propose, and :mod:`stabmon.interventions.replayed` proves by running the step's batch
again. Where not even a proposal can be made, the reason is told.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from stabmon.capture.base import HEADS
from stabmon.gradients import is_sharded, local
from stabmon.interventions.base import CannotApply
from stabmon.records import LayerInfo

QUERY = (
    *("q_proj", "query", "q", "q_lin", "wq", "to_q", "q_linear", "query_proj", "linear_q", "q_b_proj", "q_attn", "query_layer"),
    *("W_q", "w_q", "Wq", "fc_q"),
)
KEY = (
    *("k_proj", "key", "k", "k_lin", "wk", "to_k", "k_linear", "key_proj", "linear_k", "key_layer"),
    *("W_k", "w_k", "Wk", "fc_k"),
)
FUSED = (
    *("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "W_pack", "to_qkv", "in_proj", "attn_qkv", "wqkv", "c_qkv"),
    *("linear_qkv", "q_k_v"),
)
"""What models call one projection for queries, keys and values."""
INTERLEAVED = ("query_key_value", "linear_qkv", "wqkv")
"""Those of them that usually hold a group's queries, its key and its value side by side (GPT-NeoX, Bloom, Falcon, Megatron, InternLM)."""
QUERY_NORM = (
    "q_norm",
    "query_norm",
    "q_layernorm",
    "query_layernorm",
    "norm_q",
    "ln_q",
    "q_ln",
    "query_layer_norm",
    "q_layer_norm",
)
KEY_NORM = ("k_norm", "key_norm", "k_layernorm", "key_layernorm", "norm_k", "ln_k", "k_ln", "key_layer_norm", "k_layer_norm")
WIDTHS = ("qk_head_dim", "head_dim", "head_size", "attention_head_size", "key_value_proj_dim", "d_kv")
"""What models call D."""
RMS_NORM = (
    "q, k = F.rms_norm(q, q.shape[-1:], q_gain), F.rms_norm(k, k.shape[-1:], k_gain)  # in the attention's forward, before scores"
)
SEPARATE = "give the attention module projections named q_proj and k_proj, or one named qkv in the order q, k, v"


@dataclass(frozen=True, eq=False)
class Rows:
    """Some entries of a parameter along one dimension: ``[start, stop)`` of ``dim``."""

    parameter: nn.Parameter
    dim: int
    start: int
    stop: int
    offset: float = 0.0
    """The model uses ``offset + value``, as a norm does whose gain is stored as its distance from one."""

    @property
    def key(self) -> tuple[int, int, tuple[int, ...]]:
        """Equal for the same rows of the same parameter."""
        return id(self.parameter), self.dim, (self.start, self.stop)

    def view(self, tensor: Tensor) -> Tensor:
        """The rows of ``tensor``, which is the parameter or a copy of its shape; of a sharded one, those that are here.

        Raises:
            CannotApply: if the shard here is no unbroken range.
        """
        if not is_sharded(tensor):
            return tensor.narrow(self.dim, self.start, self.stop - self.start)
        here = _rows_here(tensor, self.dim)
        part = local(tensor.detach())
        if len(here) != part.shape[self.dim] or not bool((here.diff() == 1).all()):
            raise CannotApply("the parameter is sharded in a way in which its rows cannot be told apart")
        first = int(here[0]) if len(here) else 0
        start, stop = (min(max(each - first, 0), len(here)) for each in (self.start, self.stop))
        return part.narrow(self.dim, start, stop - start)


@dataclass(frozen=True, eq=False)
class QueryKey:
    """A proposal."""

    how: str
    """In words, for the record."""
    query: Sequence[Sequence[Rows]]
    """For each query head: all of its scores are proportional to these rows."""
    key: Sequence[Sequence[Rows]] | None = None
    """The same on the key side, where each query head has a key head to itself; None where scaling queries alone is exact."""
    shared: bool = False
    """The query rows are those of all heads of the layer at once: a norm's gain that they share."""
    others: Sequence[Rows] = ()
    """What else makes queries and keys."""

    def edits(self, factors: Mapping[int, float]) -> list[tuple[Rows, float]]:
        """The rows to multiply, and by what, so that the scores of each head in ``factors`` are multiplied by its factor.

        Queries and keys take the square root each where both belong to the head alone. Under a gain shared by all heads the smallest
        factor is applied to all.
        """
        if self.shared:
            return [(rows, min(factors.values())) for rows in self.query[0]]
        edits: dict[tuple[int, int, tuple[int, ...]], tuple[Rows, float]] = {}
        for head, factor in factors.items():
            sides = [*self.query[head], *(self.key[head] if self.key is not None else ())]
            each = factor if self.key is None else factor**0.5
            edits.update({rows.key: (rows, each) for rows in sides})  # one entry where queries and keys share a projection
        return list(edits.values())

    def all_rows(self) -> list[Rows]:
        """Everything that makes queries and keys, each entry once."""
        key = self.key if self.key is not None else ()
        rows = [each for side in (self.query, key) for head in side for each in head]
        return list({each.key: each for each in [*rows, *self.others]}.values())


def find_query_key(module: nn.Module, info: LayerInfo | None = None) -> list[QueryKey]:
    """What may make the queries and keys of an attention module, the likeliest first.

    Args:
        module: the module that attends.
        info: what capture has seen of its heads; without it they are looked up on the module and its config.

    Raises:
        CannotApply: naming what is missing or in the way.
    """
    heads, width = _heads(module, info)
    if isinstance(module, nn.MultiheadAttention):
        return [_torch_multihead(module)]
    query_name, query = _child(module, QUERY)
    if query is not None:
        _, key = _child(module, KEY)
        found = [_separate(query_name, query, key, heads, width)]
    else:
        name, fused = _child(module, FUSED)
        if fused is None:
            raise CannotApply(f"{type(module).__name__} has no projection of queries that is known by its name", SEPARATE)
        found = _fused(name, fused, heads, width)
    name, norm = _child(module, QUERY_NORM)
    if norm is None or isinstance(norm, nn.Identity):
        return found
    _, key_norm = _child(module, KEY_NORM)
    others = [*found[0].all_rows(), *([] if key_norm is None else _whole(key_norm))]
    return [_norm(name, norm, heads, width or _width(found[0]), others)]


def _heads(module: nn.Module, info: LayerInfo | None) -> tuple[int, int | None]:
    """H and, where known, D."""
    if info is not None:
        return info.heads, info.head_dim
    for owner in (module, getattr(module, "config", None)):
        for name in HEADS:
            heads = getattr(owner, name, None)
            if isinstance(heads, int) and not isinstance(heads, bool) and heads > 0:
                width = next((each for n in WIDTHS if isinstance(each := getattr(module, n, None), int)), None)
                return heads, width
    raise CannotApply(f"{type(module).__name__} does not tell how many heads it has", "give it an attribute num_heads")


def _child(module: nn.Module, names: Sequence[str]) -> tuple[str, nn.Module | None]:
    return next(((name, child) for name in names if isinstance(child := getattr(module, name, None), nn.Module)), ("", None))


def _parts(name: str, module: nn.Module) -> tuple[nn.Parameter, nn.Parameter | None, int]:
    """Weight, bias and the weight's output dimension of a projection.

    Raises:
        CannotApply: if it is no plain linear map, or not trained.
    """
    weight, bias = getattr(module, "weight", None), getattr(module, "bias", None)
    if hasattr(module, "base_layer") or hasattr(module, "lora_A"):
        raise CannotApply(
            f"{name} is an adapter around a frozen weight, and clipping that would be lost when only adapters are saved"
        )
    if parametrize.is_parametrized(module) or not isinstance(weight, nn.Parameter) or weight.ndim != 2:
        raise CannotApply(f"{name} ({type(module).__name__}) is no plain matrix of weights")
    if not weight.is_floating_point() or not weight.requires_grad:
        raise CannotApply(f"{name} is {'quantised' if not weight.is_floating_point() else 'frozen'}: it is not what grew")
    return weight, bias if isinstance(bias, nn.Parameter) else None, 1 if type(module).__name__ == "Conv1D" else 0


def _slices(name: str, module: nn.Module, starts: Sequence[int], width: int) -> list[list[Rows]]:
    weight, bias, dim = _parts(name, module)
    return [[Rows(weight, dim, at, at + width), *([] if bias is None else [Rows(bias, 0, at, at + width)])] for at in starts]


def _separate(name: str, query: nn.Module, key: nn.Module | None, heads: int, width: int | None) -> QueryKey:
    weight, _, dim = _parts(name, query)
    out = weight.shape[dim]
    width = width or out // heads
    if out != heads * width:
        raise CannotApply(f"{name} makes {out} features, which are not {heads} heads of {width}")
    sliced = _slices(name, query, range(0, out, width), width)
    if key is None or _out(key) % width:
        return QueryKey(f"{name} alone", sliced)
    own = _out(key) == out
    keys = _slices("key projection", key, range(0, _out(key), width), width)
    if own:
        return QueryKey(f"{name} and its key projection", sliced, keys)
    return QueryKey(f"{name} alone (keys serve several heads)", sliced, others=[each for head in keys for each in head])


def _out(module: nn.Module) -> int:
    weight, _, dim = _parts("key projection", module)
    return weight.shape[dim]


def _fused(name: str, module: nn.Module, heads: int, width: int | None) -> list[QueryKey]:
    """Both orders that a fused projection is met in, where its size allows them: q, k, v one after the other, or group by group."""
    weight, _, dim = _parts(name, module)
    out = weight.shape[dim]
    width = width or out // (3 * heads)
    key_heads = (out // width - heads) // 2 if width else 0
    if key_heads < 1 or (heads + 2 * key_heads) * width != out or heads % key_heads:
        raise CannotApply(f"{name} makes {out} features, which are not {heads} heads of {width} with keys and values", SEPARATE)
    group = heads // key_heads
    one_after_the_other = [at * width for at in range(heads)], [(heads + at) * width for at in range(key_heads)]
    by_group = (
        [(h // group * (group + 2) + h % group) * width for h in range(heads)],
        [(at * (group + 2) + group) * width for at in range(key_heads)],
    )
    orders = {"q, k, v in turn": one_after_the_other, "group by group": by_group}
    if name in INTERLEAVED:
        orders = dict(reversed(orders.items()))
    found = []
    for order, (queries, keys) in orders.items():
        query, key = (_slices(name, module, starts, width) for starts in (queries, keys))
        own = key_heads == heads
        others = [] if own else [each for head in key for each in head]
        found.append(QueryKey(f"{name}, {order}", query, key if own else None, others=others))
    return found[:1] if by_group == one_after_the_other else found


def _torch_multihead(module: nn.MultiheadAttention) -> QueryKey:
    heads, width = module.num_heads, module.head_dim
    starts = range(0, heads * width, width)
    if module.in_proj_weight is not None:
        query_weight, key_weight, shift = module.in_proj_weight, module.in_proj_weight, heads * width
    else:
        query_weight, key_weight, shift = module.q_proj_weight, module.k_proj_weight, 0
    if not (query_weight.requires_grad and key_weight.requires_grad):
        raise CannotApply("in_proj is frozen: it is not what grew")
    query = [[Rows(query_weight, 0, at, at + width)] for at in starts]
    key = [[Rows(key_weight, 0, shift + at, shift + at + width)] for at in starts]
    bias = module.in_proj_bias
    if isinstance(bias, nn.Parameter):
        for head, at in enumerate(starts):
            query[head].append(Rows(bias, 0, at, at + width))
            key[head].append(Rows(bias, 0, heads * width + at, heads * width + at + width))
    if module.bias_k is not None:  # an extra key that no projection makes
        return QueryKey("in_proj, queries alone", query, others=[each for head in key for each in head])
    return QueryKey("in_proj", query, key)


def _width(found: QueryKey) -> int:
    return found.query[0][0].stop - found.query[0][0].start


def _norm(name: str, norm: nn.Module, heads: int, width: int, others: Sequence[Rows]) -> QueryKey:
    """Behind a norm the weights no longer matter: its gain (and bias) is what scores are proportional to."""
    parts = [norm]
    stacked = getattr(norm, "norms", None)
    if isinstance(stacked, nn.ModuleList) and len(stacked) == heads:
        parts = list(stacked)
    rows: list[list[Rows]] = []
    for part in parts:
        whole = _whole(part)
        if not whole:
            raise CannotApply(f"{name} ({type(norm).__name__}) has no gain that could be lowered", RMS_NORM)
        if any(not each.parameter.requires_grad for each in whole):
            raise CannotApply(f"{name} is frozen: it is not what grew")
        rows.append([Rows(each.parameter, 0, each.start, each.stop, _offset(part, each.parameter)) for each in whole])
    gain = rows[0][0].parameter
    if len(parts) == heads:
        return QueryKey(f"gain of {name}, one norm a head", rows, others=others)
    if tuple(gain.shape) == (heads, width):
        per_head = [[Rows(each.parameter, 0, h, h + 1, each.offset) for each in rows[0]] for h in range(heads)]
    elif gain.numel() == heads * width and gain.ndim == 1:
        per_head = [[Rows(each.parameter, 0, h * width, (h + 1) * width, each.offset) for each in rows[0]] for h in range(heads)]
    elif gain.numel() == width:
        return QueryKey(f"gain of {name}, which all heads of the layer share", [rows[0]] * heads, shared=True, others=others)
    else:
        raise CannotApply(
            f"{name} has a gain of shape {tuple(gain.shape)}, which fits neither {heads} heads nor {width} features"
        )
    return QueryKey(f"gain of {name}", per_head, others=others)


def _whole(norm: nn.Module) -> list[Rows]:
    """Gain and bias of a norm."""
    found = [getattr(norm, name, None) for name in ("weight", "gain", "gamma", "bias", "beta")]
    return [Rows(each, 0, 0, each.shape[0]) for each in found if isinstance(each, nn.Parameter) and each.ndim > 0]


def _offset(norm: nn.Module, parameter: nn.Parameter) -> float:
    """0 where a norm multiplies by its gain, 1 where by one plus its gain: found by running it on a fixed input.

    Raises:
        CannotApply: if its output is proportional to neither.
    """
    trained = dict(norm.named_parameters(recurse=False))
    name = next(name for name, each in trained.items() if each is parameter)
    if name in ("bias", "beta"):
        return 0.0
    device = parameter.device
    probe = torch.linspace(-1.0, 1.5, parameter.numel(), device=device).reshape(parameter.shape)
    start = {n: torch.linspace(0.3, 0.9, each.numel(), device=device).reshape(each.shape) for n, each in trained.items()}
    with torch.no_grad(), torch.autocast(device.type, enabled=False):
        before = torch.func.functional_call(norm, start, (probe,))
        for offset in (0.0, 1.0):
            halved = {n: (each + offset) / 2 - offset if n == name else each / 2 for n, each in start.items()}
            after = torch.func.functional_call(norm, halved, (probe,))
            if torch.allclose(2 * after, before, rtol=1e-4, atol=1e-6):
                return offset
    raise CannotApply(f"{type(norm).__name__}'s output is not proportional to its gain")


def _rows_here(tensor: Tensor, dim: int) -> Tensor:
    """Numbers of the entries along ``dim`` that this rank's shard holds; found without a word to other ranks."""
    from torch.distributed.tensor import DTensor, Replicate, Shard

    sharded: Any = tensor
    mesh = sharded.device_mesh
    index = DTensor.from_local(torch.arange(tensor.shape[dim]), mesh, [Replicate()] * mesh.ndim, run_check=False)
    wanted = [Shard(0) if each.is_shard(dim) else Replicate() for each in sharded.placements]
    here: Tensor = index.redistribute(placements=wanted).to_local()
    return here.cpu()
