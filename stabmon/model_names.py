"""Names that models give their modules, attributes, inputs and config fields.

Where an order matters it is said: the first name that a module has is taken. A new family of models
that calls a thing otherwise needs its name here and nothing else.
"""

from __future__ import annotations

import re

# Read by capture.names, which leaves wrappers out of qualified names.
WRAPPERS = frozenset(
    {
        "_orig_mod",
        "_fsdp_wrapped_module",
        "_checkpoint_wrapped_module",
        "_forward_module",
        "_dp_module",
    }
)
"""Attributes that only wrappers have (torch.compile, FSDP, activation checkpoints, Lightning)."""
LEADING_WRAPPERS = frozenset({"m", "module"})
"""Attributes that wrappers have at the root (DDP's ``module``), and others anywhere else."""
PEFT_WRAPPERS = ("base_model", "model")
"""The two attributes through which PEFT holds the model that it adapts."""

# Read by capture.layout, projections.locate and engine.monitor_state, in this order.
HEAD_COUNTS = ("num_heads", "num_attention_heads", "n_heads", "n_head", "nhead", "heads", "nheads")
"""Number of query heads, on a module or a config."""
# Read by projections.locate, in this order.
HEAD_WIDTHS = (
    "qk_head_dim",
    "head_dim",
    "head_size",
    "attention_head_size",
    "key_value_proj_dim",
    "d_kv",
)
"""Head dimension D, on a module or a config."""

# Read by projections.locate (norms by check.measuring too) among the children of an attention
# module, in this order.
QUERY_PROJECTIONS = (
    *("q_proj", "query", "q", "q_lin", "wq", "to_q", "q_linear", "query_proj", "linear_q"),
    *("q_b_proj", "q_attn", "query_layer", "W_q", "w_q", "Wq", "fc_q"),
)
KEY_PROJECTIONS = (
    *("k_proj", "key", "k", "k_lin", "wk", "to_k", "k_linear", "key_proj", "linear_k", "key_layer"),
    *("W_k", "w_k", "Wk", "fc_k"),
)
FUSED_PROJECTIONS = (
    *("c_attn", "qkv", "qkv_proj", "query_key_value", "Wqkv", "W_pack", "to_qkv", "in_proj"),
    *("attn_qkv", "wqkv", "c_qkv", "linear_qkv", "q_k_v"),
)
"""One projection for queries, keys and values."""
INTERLEAVED_PROJECTIONS = ("query_key_value", "linear_qkv", "wqkv")
"""Fused projections that usually hold a group's queries, its key and its value side by side
(GPT-NeoX, Bloom, Falcon, Megatron, InternLM).
"""
QUERY_NORMS = (
    *("q_norm", "query_norm", "q_layernorm", "query_layernorm", "norm_q", "ln_q", "q_ln"),
    *("query_layer_norm", "q_layer_norm"),
)
KEY_NORMS = (
    *("k_norm", "key_norm", "k_layernorm", "key_layernorm", "norm_k", "ln_k", "k_ln"),
    *("key_layer_norm", "k_layer_norm"),
)

# Read by interventions.soften_logits and interventions.cap_scale.
SCALES = ("scaling", "scale", "softmax_scale", "norm_factor", "inv_norm_factor")
"""Number by which an attention module multiplies its scores."""
# Read by interventions.logit_softcap.
SOFTCAPS = (
    *("attn_logit_softcapping", "attn_logit_softcap", "logit_softcap", "softcap"),
    "attn_softcap",
)
"""Softcap of an attention module's scores."""
# Read by interventions.increase_dropout.
DROPOUTS = (
    *("attention_dropout", "attn_dropout", "attn_dropout_p", "attention_dropout_prob", "attn_drop"),
    *("dropout_p", "dropout"),
)
"""Dropout of an attention module: a number read at each forward, or an ``nn.Dropout``."""

# Read by check.loading and check.sweep in configs of transformers.
LAYER_COUNTS = (
    *("num_hidden_layers", "n_layer", "n_layers", "num_layers", "num_decoder_layers"),
    *("encoder_layers", "decoder_layers"),
)
FEED_FORWARD_WIDTHS = ("intermediate_size", "n_inner", "ffn_dim", "d_ff")
"""Widths of a feed-forward part that scale with the model's width."""
OTHER_FEED_FORWARD_WIDTHS = ("encoder_ffn_dim", "decoder_ffn_dim", "ffn_hidden_size")
"""The same of encoder-decoders and Falcon, which check.sweep does not narrow."""
EXPERT_WIDTHS = ("moe_intermediate_size", "shared_expert_intermediate_size")
CONFIG_DROPOUTS = (
    *("attention_dropout", "attn_pdrop", "resid_pdrop", "embd_pdrop", "hidden_dropout_prob"),
    "attention_probs_dropout_prob",
)

# Read by controllers.attach, in module names in lower case.
CROSS_PARTS = ("cross", "encoder_attn", "encdecattention", "enc_attn")
"""Parts of names of attention over another sequence's keys."""
# Read by analysis.rollout.stacks and analysis.call_facts, in layer names.
CROSS_ATTENTION = re.compile(
    r"cross|enc_?dec|encoder_?attn|encoder_?attention|src_?attn|memory_?attn", re.I
)
"""A block's attention over another sequence: ``crossattention``, ``EncDecAttention`` ..."""
TOWER = re.compile(r"enc|dec|text|vision|visual|image|audio|language|query_tower|key_tower", re.I)
"""Parts that are stacks of their own where no list of blocks says so."""

# Read by analysis.chunks among the inputs of a forward, in this order.
BATCHED_INPUTS = ("input_ids", "inputs_embeds", "pixel_values", "input_features", "input_values")
"""Inputs whose first dimension is the batch."""
UNBATCHED_INPUTS = frozenset(
    {"mask", "src_mask", "tgt_mask", "memory_mask", "attn_mask", "cache_position"}
)
"""Inputs without a batch dimension, whatever their size."""
# Read by nonfinite.causes among the inputs of a forward.
LABELS = re.compile(r"label|target|^y$|^tgt", re.IGNORECASE)
MASKS = re.compile(r"mask|bias", re.IGNORECASE)
# Read by capture.callers among the arguments of an attention module's forward.
NOT_HIDDEN_STATES = re.compile(
    r"mask|bias|pos|rotary|rope|freqs|cos|sin|rel|residual|^value|^v$|alibi|object_quer"
)
"""Tensors of which neither queries nor keys are made."""
