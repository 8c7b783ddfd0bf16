"""Small models and loops for tests of the engine and its front doors.

Transformers is imported where it is used: a process that builds none of its models starts in half
the time.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils.data import Dataset

BATCH, LENGTH, VOCABULARY, HEADS = 4, 12, 32, 4


def gpt2(dropout: float = 0.0, **changes: Any) -> Any:
    """Two layers of four heads, width 32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    sizes = {
        "n_embd": 32,
        "n_layer": 2,
        "n_head": HEADS,
        "n_positions": 64,
        "vocab_size": VOCABULARY,
        "loss_type": "ForCausalLM",
    }
    tokens = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "use_cache": False}
    drops = {"attn_pdrop": dropout, "resid_pdrop": dropout, "embd_pdrop": dropout}
    return GPT2LMHeadModel(GPT2Config(**(sizes | tokens | drops | changes))).train()


def llama(**changes: Any) -> Any:
    """Two layers of four query heads and two key heads, width 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": HEADS,
    }
    more = {
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
    }
    return LlamaForCausalLM(
        LlamaConfig(**(sizes | more | {"bos_token_id": 1, "eos_token_id": 2} | changes))
    ).train()


class Attention(nn.Module):
    """Causal self-attention by torch's own function, ``[B, S, 32] -> [B, S, 32]``."""

    def __init__(self) -> None:
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(-2))


class Floats(nn.Module):
    """Attention over float inputs ``[B, S, 32]``; gives the logits and no loss."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm, self.second, self.head = (
            Attention(),
            nn.LayerNorm(32),
            Attention(),
            nn.Linear(32, 4),
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.first(x)
        return self.head((x + self.second(self.norm(x))).mean(1))


class Tokens(Dataset[dict[str, Tensor]]):
    """Random tokens and their labels, the same at each index."""

    def __init__(self, rows: int = 64) -> None:
        self.tokens = batches(1, rows)[0]

    def __len__(self) -> int:
        return len(self.tokens)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": self.tokens[index], "labels": self.tokens[index]}


def batches(count: int, rows: int = BATCH, seed: int = 1) -> list[Tensor]:
    """``count`` batches of tokens ``[rows, LENGTH]``."""
    generator = torch.Generator().manual_seed(seed)
    return list(torch.randint(3, VOCABULARY, (count, rows, LENGTH), generator=generator))


def optimizer_of(model: nn.Module, rate: float = 1e-2) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), rate)


def train(
    model: nn.Module,
    monitor: Any,
    optimizer: torch.optim.Optimizer,
    data: Iterable[Tensor],
    *,
    clip: float | None = 1.0,
    called: Callable[..., Any] | None = None,
    between: Callable[[int], None] | None = None,
) -> list[Any]:
    """A plain loop; gives what ``on_step`` gave at each step. ``between`` is called with the step's
    number before each.
    """
    given = []
    for step, tokens in enumerate(data, start=1):
        if between is not None:
            between(step)
        loss = (model if called is None else called)(input_ids=tokens, labels=tokens).loss
        loss.backward()
        if clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), clip)
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step(loss=loss) if monitor is not None else None)
    return given


def weights(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers, copied."""
    return {
        name: tensor.detach().clone()
        for name, tensor in (*model.named_parameters(), *model.named_buffers())
    }


def same_bits(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    """Whether two models are the same to the last bit, NaN being the same as NaN."""
    return left.keys() == right.keys() and all(
        torch.equal(left[name].nan_to_num(1.5), right[name].nan_to_num(1.5))
        and torch.equal(left[name].isnan(), right[name].isnan())
        for name in left
    )


def same_readings(left: Any, right: Any, tolerance: float = 0.0) -> bool:
    """Whether two ``stats`` hold the same layers, signals and values."""
    return left.keys() == right.keys() and all(
        left[layer].keys() == right[layer].keys()
        and np.allclose(
            left[layer][name], right[layer][name], rtol=tolerance, atol=tolerance, equal_nan=True
        )
        for layer in left
        for name in left[layer]
    )


def clean(model: nn.Module) -> bool:
    """Whether nothing of a monitor is in the model, in transformers, or on torch's stack of
    function modes.
    """
    from transformers.modeling_utils import AttentionInterface

    kinds = ("_forward_pre_hooks", "_forward_hooks", "_backward_hooks")
    hooks = [
        hook
        for module in model.modules()
        for kind in kinds
        for hook in getattr(module, kind).values()
    ]
    ours = [hook for hook in hooks if type(hook).__module__.startswith("stabmon")]
    hooked = [
        parameter for parameter in model.parameters() if parameter._post_accumulate_grad_hooks
    ]
    unpatched = (
        AttentionInterface.__dict__["get_interface"].__module__ == "transformers.modeling_utils"
    )
    local = "<locals>" in AttentionInterface.__dict__["get_interface"].__code__.co_qualname
    return (
        not ours and not hooked and unpatched and not local and _get_current_function_mode() is None
    )


def lines(path: Path) -> list[dict[str, Any]]:
    """The records of a JSON lines file."""
    return [json.loads(line) for line in path.read_text().splitlines()]


class PackedAttention(nn.Module):
    """Attention of its own kind: scores are picked by a bool mask into one list before their
    softmax, which loses rows and keys.
    """

    def __init__(self, width: int = 12, *, packed: bool = True) -> None:
        super().__init__()
        self.qkv, self.packed = nn.Linear(width, 3 * width), packed

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        scores = q @ k.mT
        picked = (
            scores[torch.ones_like(scores, dtype=torch.bool)].view(scores.shape)
            if self.packed
            else scores
        )
        return x + picked.softmax(-1) @ v


class HalfSeen(nn.Module):
    """Two attention modules, of which one is seen."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = PackedAttention(packed=False), PackedAttention()

    def forward(self, x: Tensor) -> Tensor:
        return self.second(self.first(x))
