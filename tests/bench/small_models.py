"""Small models of transformers from their default configurations, with batches.

No class is named here: sizes are recognised by what configurations call them. A class that cannot
be made small in this way gives the reason.
"""

from __future__ import annotations

import inspect
import re
from typing import Any

import torch
from torch import Tensor, nn

TASKS = (
    *(
        "MODEL_FOR_CAUSAL_LM",
        "MODEL_FOR_MASKED_LM",
        "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM",
        "MODEL_FOR_IMAGE_CLASSIFICATION",
    ),
    *(
        "MODEL_FOR_MASKED_IMAGE_MODELING",
        "MODEL_FOR_OBJECT_DETECTION",
        "MODEL_FOR_ZERO_SHOT_OBJECT_DETECTION",
    ),
    *(
        "MODEL_FOR_SEMANTIC_SEGMENTATION",
        "MODEL_FOR_INSTANCE_SEGMENTATION",
        "MODEL_FOR_UNIVERSAL_SEGMENTATION",
    ),
)
"""Auto classes to try; ``MODEL`` has the bare models of every kind besides."""
BATCH, LENGTH, WIDTH, HEADS, VOCABULARY, IMAGE = 2, 12, 32, 4, 99, 64
LARGEST = 40_000_000
"""Number of parameters above which a model is not small."""

WIDTHS = (
    r"hidden_size|d_model|embed_dim|n_embd|dim|hidden_dim|d_hidden|emb_dim|embedding_size|"
    r"word_embed_proj_dim|out_hidden_size|width"
)
SIZES: tuple[tuple[str, int], ...] = (
    (
        rf"(encoder_|decoder_|text_|vision_)?({WIDTHS})|projection_dim|pooler_hidden_size|"
        r"cross_(attention_)?hidden_size",
        WIDTH,
    ),
    (
        r".*(intermediate_size|ffn_dim|inner_dim|d_ff|ffn_hidden_size|mlp_dim|dim_feedforward|"
        r"intermediate_dim)",
        48,
    ),
    (r".*(num_.*layers|_layers|n_layer|n_layers|num_blocks|depth)|num_hidden_layers", 2),
    (
        r"(.*_)?(num_attention_heads|num_heads|n_head|n_heads|attention_heads|num_query_heads)",
        HEADS,
    ),
    (r"(.*_)?num_key_value_heads|num_kv_heads|multi_query_group_num", 2),
    (r"qk_head_dim|mamba_d_head|mamba_head_dim|linear_(key|value)_head_dim", 16),
    (
        r"(.*_)?head_dim|d_kv|v_head_dim|qk_nope_head_dim|qk_rope_head_dim|attention_head_size|"
        r"rotary_dim",
        8,
    ),
    (r"kv_lora_rank|q_lora_rank|lora_rank|o_lora_rank|.*low_rank.*", 16),
    (r"vocab_size|(.*_)?vocab_size(_per_layer_input)?|entity_vocab_size|n_vocab", VOCABULARY),
    (
        r"max_position_embeddings|n_positions|max_source_positions|max_target_positions|n_ctx|"
        r"max_seq_len|max_sequence_length",
        128,
    ),
    (r"image_size|pretrain_image_size|img_size|input_size", IMAGE),
    (r"num_experts|num_local_experts|n_routed_experts|moe_num_experts", 4),
    (r"num_experts_per_tok|moe_topk|moe_k|topk_group|n_group|num_expert_group", 2),
    (r"num_queries|num_query_tokens|num_latents", 8),
    (r"d_latents|mamba_d_state|state_size|num_mel_bins", 16),
)
"""Patterns of the names of sizes, with their small values."""
KEPT = r".*(_token_id|_token_index|_index|patch_size|num_labels|num_channels|group_size)$"


class NotSmallError(Exception):
    """Reason for a class that cannot be made small."""


def class_names(*more: str) -> dict[str, str]:
    """Return class name -> model type of every model of the tasks and of ``more``.

    ``more`` are further auto classes.
    """
    from transformers.models.auto import modeling_auto

    names: dict[str, str] = {}
    for task in (*TASKS, *more):
        for model_type, found in getattr(modeling_auto, f"{task}_MAPPING_NAMES").items():
            for name in (found,) if isinstance(found, str) else found:
                names.setdefault(name, model_type)
    return dict(sorted(names.items()))


def shrink(config: Any, *, thoroughly: bool, depth: int = 0) -> None:
    """Make every recognised size small.

    Only the number of layers, words and positions where not ``thoroughly``.
    """
    rows = SIZES if thoroughly else [row for row in SIZES if "layer" in row[0] or "vocab" in row[0]]
    heads = next(
        (
            getattr(config, n)
            for n in ("num_attention_heads", "num_heads", "n_heads")
            if hasattr(config, n)
        ),
        None,
    )
    for name, value in list(vars(config).items()):
        if name.startswith("_") or isinstance(value, bool):
            continue
        if (
            hasattr(value, "to_dict")
            and hasattr(value, "model_type")
            and depth < 3
            and name != "backbone_config"
        ):
            shrink(value, thoroughly=thoroughly, depth=depth + 1)
            continue
        if re.fullmatch(KEPT, name):
            if (
                isinstance(value, int)
                and name.endswith(("_token_id", "_token_index"))
                and value >= VOCABULARY
            ):
                _set(config, name, VOCABULARY - 1 - sum(map(ord, name)) % 20)
            continue
        if isinstance(value, dict) and isinstance(value.get("mrope_section"), list):
            _set(config, name, value | {"mrope_section": [2, 1, 1]})
        if (
            name == "backbone_config"
            and thoroughly
            and getattr(value, "model_type", "") in ("timm_backbone", "hgnet_v2", "resnet")
        ):
            _set(config, name, _small_backbone(value))
            continue
        small = next((size for pattern, size in rows if re.fullmatch(pattern, name)), None)
        if re.fullmatch(r"(.*_)?num_key_value_heads", name) and value == heads:
            small = HEADS  # no grouped heads before, none after
        if isinstance(value, int) and small is not None and value > small:
            _set(config, name, small)
        elif name == "depths" and isinstance(value, list | tuple):
            _set(config, name, [1 for _ in value])
        elif (
            name in ("hidden_sizes", "embed_dims")
            and thoroughly
            and isinstance(value, list | tuple)
        ):
            _set(config, name, [WIDTH for _ in value])
        elif name == "image_size" and isinstance(value, list | tuple) and thoroughly:
            _set(config, name, type(value)(IMAGE for _ in value))
    layers = next(
        (
            getattr(config, n)
            for n in ("num_hidden_layers", "n_layer")
            if isinstance(getattr(config, n, None), int)
        ),
        0,
    )
    for name, value in list(vars(config).items()):
        if (
            layers
            and isinstance(value, list)
            and ("layer" in name or name.endswith(("_types", "_pattern")))
            and len(value) > layers
        ):
            kinds = list(dict.fromkeys(map(str, value)))
            picked = [next(v for v in value if str(v) == kind) for kind in kinds][:layers]
            _set(config, name, (picked + value)[:layers])


def _small_backbone(config: Any) -> Any:
    """Return a small ResNet in place of a backbone with missing packages or weights."""
    from transformers import ResNetConfig

    wanted = getattr(config, "out_indices", None) or [4]
    features = [f"stage{i}" for i in range(5 - min(len(wanted), 4), 5)]
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16, 16, WIDTH], "depths": [1, 1, 1, 1]}
    return ResNetConfig(**sizes, layer_type="basic", out_features=features)


def _set(config: Any, name: str, value: Any) -> None:
    try:
        setattr(config, name, value)
    except Exception:  # a strict configuration refuses: it keeps what it had
        return


def build(
    name: str, model_type: str, *, attention: str | None = None, thoroughly: bool = True
) -> nn.Module:
    """Build the model of a class with random weights, in training mode."""
    import transformers
    from transformers import CONFIG_MAPPING

    cls = getattr(transformers, name)
    config = CONFIG_MAPPING[model_type]()
    shrink(config, thoroughly=thoroughly)
    if attention is not None:
        # the attribute behind attn_implementation, set without a check; transformers 5.23
        config._attn_implementation = attention
    with torch.device("meta"):
        size = sum(
            p.numel() for p in cls._from_config(config).parameters() if hasattr(cls, "_from_config")
        )
    if size > LARGEST:
        raise NotSmallError(f"{size / 1e6:.0f} million parameters")
    torch.manual_seed(0)
    # _from_config: the constructor with an attention implementation; checked with transformers 5.23
    model: nn.Module = cls._from_config(config)
    return model.train()


def batch_for(model: Any, *, images: bool = False) -> dict[str, Any]:
    """Make inputs by the names of the forward's parameters; ``images`` beside text."""
    config, names = model.config, inspect.signature(model.forward).parameters
    generator = torch.Generator().manual_seed(1)

    def find(attribute: str, default: Any) -> Any:
        for part in (
            config,
            *(
                getattr(config, p, None)
                for p in ("vision_config", "text_config", "backbone_config", "audio_config")
            ),
        ):
            value = getattr(part, attribute, None)
            if value is not None:
                return value
        return default

    def ids(length: int = LENGTH) -> Tensor:
        return torch.randint(
            3, min(70, find("vocab_size", VOCABULARY)), (BATCH, length), generator=generator
        )

    batch: dict[str, Any] = {}
    if "input_ids" in names:
        batch["input_ids"] = ids()
        batch["attention_mask"] = torch.ones(BATCH, LENGTH, dtype=torch.long)
    if "decoder_input_ids" in names:
        batch["decoder_input_ids"] = ids(8)
    main = getattr(model, "main_input_name", "input_ids")
    if "pixel_values" in names and (
        images
        or "input_ids" not in names
        or main == "pixel_values"
        or not _is_optional(names, "pixel_values")
    ):
        size = find("image_size", IMAGE)
        height, width = (size[-2], size[-1]) if isinstance(size, list | tuple) else (size, size)
        batch["pixel_values"] = torch.randn(
            BATCH, find("num_channels", 3), height, width, generator=generator
        )
        if main == "pixel_values_videos" or "num_frames" in vars(config):
            batch["pixel_values"] = torch.randn(
                BATCH, find("num_frames", 2), 3, height, width, generator=generator
            )
        if (
            main == "pixel_values"
            and "input_ids" in batch
            and _is_optional(names, "input_ids")
            and "decoder_input_ids" in batch
        ):
            del batch["input_ids"]
    if "input_values" in names:
        batch["input_values"] = torch.randn(BATCH, 2000, generator=generator)
    if "input_features" in names and "input_ids" not in names:
        batch["input_features"] = torch.randn(
            BATCH,
            find("num_mel_bins", 16),
            2 * find("max_source_positions", 64),
            generator=generator,
        )
    if "bbox" in names:
        batch["bbox"] = torch.zeros(BATCH, LENGTH, 4, dtype=torch.long)
    if "use_cache" in names:
        batch["use_cache"] = False
    if "attention_mask" in batch and "attention_mask" not in names:
        del batch["attention_mask"]
    if "inputs" in names and main == "inputs":
        batch["inputs"] = ids(64)
    if not batch.keys() - {"use_cache"}:
        raise NotSmallError(f"no batch is known for {main}")
    return batch


def _is_optional(names: Any, name: str) -> bool:
    return name in names and names[name].default is not inspect.Parameter.empty
