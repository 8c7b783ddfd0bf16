"""Tiny models of many families with random weights, and a batch for each."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Built = tuple[nn.Module, dict[str, Any]]
BATCH, LENGTH, WIDTH, HEADS, VOCABULARY = 2, 12, 32, 4, 64
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}


BERT_SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": HEADS,
    "max_position_embeddings": 64,
    "hidden_dropout_prob": 0.0,
    "attention_probs_dropout_prob": 0.0,
}


def seeded(build: Callable[[], nn.Module]) -> nn.Module:
    """Build a model with the same weights each time.

    They are large enough to make one attention pattern differ from another.
    """
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = build()
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim >= 2 and "embed" not in name:
                    parameter.normal_(0, 2 / math.sqrt(parameter.shape[-1]))
                elif "sinks" in name:
                    parameter.normal_(0, 1)
    return model.train()


def tokens(
    length: int = LENGTH, *, seed: int = 1, padding: int = 0, side: str = "right"
) -> dict[str, Any]:
    """Return token numbers and their mask, the second row padded."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (BATCH, length), generator=generator)
    mask = torch.ones_like(ids)
    if padding:
        where = slice(length - padding, None) if side == "right" else slice(0, padding)
        ids[1, where], mask[1, where] = 0, 0
    return {"input_ids": ids, "attention_mask": mask} if padding else {"input_ids": ids}


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Return normal numbers."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def llama_like(name: str, implementation: str, **changes: Any) -> Built:
    """Return a decoder of the Llama family, grouped heads 4:2."""
    import transformers

    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=64,
        use_cache=False,
        **SPECIAL,
    )
    return decoder(getattr(transformers, f"{name}Config")(**(sizes | changes)), implementation)


def decoder(config: Any, implementation: str, inputs: dict[str, Any] | None = None) -> Built:
    """Return the causal language model of a config."""
    from transformers import AutoModelForCausalLM

    build = seeded(
        lambda: AutoModelForCausalLM.from_config(config, attn_implementation=implementation)
    )
    return build, inputs or tokens()


def gpt2(implementation: str, **changes: Any) -> Built:
    from transformers import GPT2Config

    sizes: dict[str, Any] = dict(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_head=HEADS,
        n_layer=2,
        n_positions=64,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        use_cache=False,
        **SPECIAL,
    )
    return decoder(GPT2Config(**(sizes | changes)), implementation)


def gpt_neox(implementation: str) -> Built:
    from transformers import GPTNeoXConfig

    config = GPTNeoXConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        use_cache=False,
        **SPECIAL,
    )
    return decoder(config, implementation)


def gpt_oss(implementation: str) -> Built:
    return llama_like(
        "GptOss",
        implementation,
        sliding_window=5,
        num_local_experts=2,
        num_experts_per_tok=1,
        rope_scaling=None,
        layer_types=["sliding_attention", "full_attention"],
    )


def deepseek_v3(implementation: str) -> Built:
    return llama_like(
        "DeepseekV3",
        implementation,
        head_dim=4,
        num_key_value_heads=HEADS,
        q_lora_rank=16,
        kv_lora_rank=8,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        moe_intermediate_size=16,
        first_k_dense_replace=1,
        n_shared_experts=1,
    )


def opt(implementation: str) -> Built:
    from transformers import OPTConfig

    config = OPTConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=WIDTH,
        ffn_dim=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        max_position_embeddings=64,
        dropout=0.0,
        use_cache=False,
        **SPECIAL,
    )
    return decoder(config, implementation, tokens(padding=3))


def bloom() -> Built:
    from transformers import BloomConfig

    config = BloomConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        n_layer=2,
        n_head=HEADS,
        attention_dropout=0.0,
        hidden_dropout=0.0,
        use_cache=False,
        **SPECIAL,
    )
    return decoder(config, "eager", tokens(padding=3))


def gptj() -> Built:
    from transformers import GPTJConfig

    config = GPTJConfig(
        vocab_size=VOCABULARY,
        n_embd=WIDTH,
        n_layer=2,
        n_head=HEADS,
        n_positions=64,
        rotary_dim=4,
        attn_pdrop=0.0,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        use_cache=False,
        **SPECIAL,
    )
    return decoder(config, "eager")


def falcon(implementation: str, *, alibi: bool = False) -> Built:
    from transformers import FalconConfig

    config = FalconConfig(
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        alibi=alibi,
        multi_query=not alibi,
        new_decoder_architecture=False,
        use_cache=False,
        **SPECIAL,
    )
    return decoder(config, implementation)


def mpt() -> Built:
    from transformers import MptConfig

    config = MptConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        n_heads=HEADS,
        n_layers=2,
        max_seq_len=64,
        use_cache=False,
    )
    return decoder(config, "eager")


def encoder(name: str, implementation: str, **changes: Any) -> Built:
    """Return a BERT-like encoder with padding."""
    import transformers

    sizes: dict[str, Any] = BERT_SIZES
    config = getattr(transformers, f"{name}Config")(**(sizes | changes))
    build = seeded(
        lambda: transformers.AutoModel.from_config(config, attn_implementation=implementation)
    )
    return build, tokens(padding=4)


def t5(implementation: str) -> Built:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=48,
        num_layers=1,
        num_heads=HEADS,
        dropout_rate=0.0,
        use_cache=False,
        decoder_start_token_id=0,
    )
    config._attn_implementation = implementation
    return seeded(lambda: T5ForConditionalGeneration(config)), tokens(padding=3) | {
        "labels": tokens(7, seed=2)["input_ids"]
    }


def vit(implementation: str) -> Built:
    from transformers import ViTConfig, ViTModel

    config = ViTConfig(
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=HEADS,
        image_size=16,
        patch_size=4,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
    )
    config._attn_implementation = implementation
    return seeded(lambda: ViTModel(config)), {"pixel_values": noise(BATCH, 3, 16, 16)}


def whisper(implementation: str) -> Built:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        encoder_layers=1,
        decoder_layers=1,
        encoder_attention_heads=HEADS,
        decoder_attention_heads=HEADS,
        encoder_ffn_dim=48,
        decoder_ffn_dim=48,
        num_mel_bins=8,
        max_source_positions=10,
        max_target_positions=32,
        use_cache=False,
        decoder_start_token_id=1,
        dropout=0.0,
        **SPECIAL,
    )
    config._attn_implementation = implementation
    inputs = {"input_features": noise(BATCH, 8, 20), "labels": tokens(7)["input_ids"]}
    return seeded(lambda: WhisperForConditionalGeneration(config)), inputs


class Attention(nn.Module):
    """Causal self-attention written by hand, in one of several ways."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how, self.n_head = how, HEADS
        self.qkv, self.proj = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.softmax = nn.Softmax(dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        (batch, length, width), heads = x.shape, self.n_head
        q, k, v = (
            part.view(batch, length, heads, width // heads).transpose(1, 2)
            for part in self.qkv(x).chunk(3, -1)
        )
        hidden = torch.ones(length, length, dtype=torch.bool, device=x.device).triu(1)
        scale = q.shape[-1] ** -0.5
        if self.how == "fused":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        elif self.how == "flex":
            from torch.nn.attention.flex_attention import create_block_mask, flex_attention

            blocks = create_block_mask(
                lambda b, h, i, j: i >= j, None, None, length, length, device=x.device
            )
            y = flex_attention(q, k, v, block_mask=blocks)
        elif self.how == "flex_score":
            from torch.nn.attention.flex_attention import flex_attention

            y = flex_attention(
                q,
                k,
                v,
                score_mod=lambda s, b, h, i, j: torch.where(i >= j, s - 0.1 * (i - j), -torch.inf),
            )
        elif self.how == "manual":
            y = (
                F.softmax((q @ k.transpose(-2, -1) * scale).masked_fill(hidden, -torch.inf), dim=-1)
                @ v
            )
        elif self.how == "fill":
            y = self.softmax((q @ k.mT / math.sqrt(q.shape[-1])).masked_fill(hidden, -1e9)) @ v
        elif self.how == "in_place":
            scores = torch.matmul(q, k.mT)
            scores *= scale
            scores[..., hidden] = -torch.inf
            y = scores.softmax(-1) @ v
        elif self.how == "shifted":
            scores = (q @ k.mT * scale).masked_fill(hidden, -torch.inf)
            y = torch.softmax(scores - scores.amax(-1, keepdim=True), -1) @ v
        elif self.how == "softcap":
            y = (
                F.softmax(
                    (3 * torch.tanh(q @ k.mT * scale / 3)).masked_fill(hidden, -torch.inf), dim=-1
                )
                @ v
            )
        elif self.how == "alibi":
            place = torch.arange(length, device=x.device)
            scores = q @ k.mT * scale + 0.3 * (place - place[:, None])
            y = F.softmax(scores.masked_fill(hidden, torch.finfo(scores.dtype).min), dim=-1) @ v
        elif self.how == "einsum":
            scores = torch.einsum("bhid,bhjd->bhij", q, k) * scale
            y = torch.einsum(
                "bhij,bhjd->bhid", scores.masked_fill(hidden, -torch.inf).softmax(-1), v
            )
        elif self.how == "folded":
            q, k, v = (part.reshape(batch * heads, length, -1) for part in (q, k, v))
            scores = torch.bmm(q * scale, k.mT) + torch.zeros_like(
                hidden, dtype=q.dtype
            ).masked_fill(hidden, -torch.inf)
            y = (F.softmax(scores, dim=-1) @ v).view(batch, heads, length, -1)
        elif self.how == "cosine":
            gain = torch.full((heads, 1, 1), 4.0)
            y = (
                F.softmax(
                    (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT * gain).masked_fill(
                        hidden, -torch.inf
                    ),
                    -1,
                )
                @ v
            )
        else:
            raise ValueError(self.how)
        return self.proj(y.transpose(1, 2).reshape(batch, length, width))


HAND_WRITTEN = (
    *("fused", "flex", "flex_score", "manual", "fill", "in_place"),
    *("shifted", "softcap", "alibi", "einsum", "folded", "cosine"),
)


class Tower(nn.Module):
    """Blocks of one attention each, with a gate beside it whose softmax is none."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(make() for _ in range(2))
        self.gates = nn.ModuleList(nn.Linear(WIDTH, 2) for _ in range(2))
        self.head = nn.Linear(WIDTH, VOCABULARY)

    def forward(self, x: Tensor) -> Tensor:
        for block, gate in zip(self.blocks, self.gates, strict=True):
            weight = torch.softmax(gate(x), dim=-1)
            x = x + weight[..., :1] * block(x)
        return self.head(x).log_softmax(-1)


def hand_written(how: str) -> Built:
    return seeded(lambda: Tower(lambda: Attention(how))), {"x": noise(BATCH, LENGTH, WIDTH)}


class MultiHead(nn.Module):
    """``nn.MultiheadAttention`` that does or does not return its weights."""

    def __init__(self, need_weights: bool) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=True)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        padding = torch.zeros(x.shape[:2], dtype=torch.bool)
        padding[1, -3:] = True
        y: Tensor = self.attention(
            x, x, x, key_padding_mask=padding, attn_mask=hidden, need_weights=self.need_weights
        )[0]
        return y


def multihead(need_weights: bool) -> Built:
    return seeded(lambda: MultiHead(need_weights)), {"x": noise(BATCH, LENGTH, WIDTH)}


def transformer_encoder() -> Built:
    def build() -> nn.Module:
        layer = nn.TransformerEncoderLayer(WIDTH, HEADS, 48, dropout=0.0, batch_first=True)
        return nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)

    padding = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    padding[1, -3:] = True
    return seeded(build), {"src": noise(BATCH, LENGTH, WIDTH), "src_key_padding_mask": padding}


def zoo() -> dict[str, Callable[[], Built]]:
    """Return builders by name, of a model and the keyword arguments of its forward.

    Models are in training mode without dropout. FlexAttention has no backward on CPU: run those
    with ``flex`` in their name without gradients.
    """
    models: dict[str, Callable[[], Built]] = {}

    def add(
        name: str,
        build: Callable[..., Built],
        *,
        implementations: tuple[str, ...] = ("sdpa", "eager"),
        **changes: Any,
    ) -> None:
        for implementation in implementations:
            models[f"{name}-{implementation}"] = partial(build, implementation, **changes)

    def llama(name: str, **changes: Any) -> Callable[[str], Built]:
        return lambda implementation: llama_like(name, implementation, **changes)

    def bert(name: str, **changes: Any) -> Callable[[str], Built]:
        return lambda implementation: encoder(name, implementation, **changes)

    everywhere = ("sdpa", "eager", "flex_attention")
    windows = {"sliding_window": 5, "layer_types": ["sliding_attention", "full_attention"]}
    add("gpt2", gpt2)
    add("gpt2_layer_scaled", gpt2, scale_attn_by_inverse_layer_idx=True)
    add("gpt2_upcast", gpt2, implementations=("eager",), reorder_and_upcast_attn=True)
    add("llama", llama("Llama"), implementations=everywhere)
    add("mistral", llama("Mistral", sliding_window=5), implementations=everywhere)
    add("qwen2", llama("Qwen2"))
    add("qwen3", llama("Qwen3"))
    add(
        "gemma2",
        llama("Gemma2", attn_logit_softcapping=2.0, query_pre_attn_scalar=8, **windows),
        implementations=everywhere[1:],
    )
    add("gemma3", llama("Gemma3Text", query_pre_attn_scalar=8, **windows))
    add("gpt_neox", gpt_neox)
    add("gpt_oss", gpt_oss, implementations=("eager",))
    add("deepseek_v3", deepseek_v3)
    add("opt", opt)
    add("falcon", falcon)
    add("falcon_alibi", lambda implementation: falcon(implementation, alibi=True))
    add("bert", bert("Bert"))
    add("albert", bert("Albert", embedding_size=16, classifier_dropout_prob=0.0))
    add("t5", t5)
    add("vit", vit)
    add("whisper", whisper)
    models |= {"bloom": bloom, "gptj": gptj, "mpt": mpt, "transformer_encoder": transformer_encoder}
    for how in HAND_WRITTEN:
        models[f"hand_written-{how}"] = partial(hand_written, how)
    for need_weights in (False, True):
        name = f"multihead-{'weights' if need_weights else 'fused'}"
        models[name] = partial(multihead, need_weights)
    return models
