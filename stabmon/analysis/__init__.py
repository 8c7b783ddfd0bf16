"""Look into the attention of any model: attribution, patterns, and what a compressed KV cache loses.

>>> import torch
>>> from stabmon.analysis import attention_rollout
>>> attention_rollout([torch.full((4, 4), 0.25)] * 2).first_token_share[0, -1].item()
0.1875
"""

from stabmon.analysis.attention_maps import AttentionMaps, attention_maps
from stabmon.analysis.attribution import AttributionSummary, aggregate_attribution, compute_attention_attribution
from stabmon.analysis.compression_advice import CompressionAdvice, Recommendation, compression_advice
from stabmon.analysis.head_roles import HeadRole
from stabmon.analysis.insights import Insight
from stabmon.analysis.kv_cache import (
    CakeReport,
    CompressedCache,
    LayerCache,
    compressed_generate,
    perplexity_by_cache_size,
    simulate_cache,
    simulate_cake,
)
from stabmon.analysis.pattern_record import AttentionPatterns
from stabmon.analysis.patterns import attention_patterns
from stabmon.analysis.record import AnalysisRecord, load_record, save_record
from stabmon.analysis.rollout import attention_rollout
from stabmon.analysis.rollout_result import Rollout
from stabmon.analysis.similarity import LayerSimilarity, layer_similarity

__all__ = [
    "AnalysisRecord",
    "AttentionMaps",
    "AttentionPatterns",
    "AttributionSummary",
    "CakeReport",
    "CompressedCache",
    "CompressionAdvice",
    "HeadRole",
    "Insight",
    "LayerCache",
    "LayerSimilarity",
    "Recommendation",
    "Rollout",
    "aggregate_attribution",
    "attention_maps",
    "attention_patterns",
    "attention_rollout",
    "compressed_generate",
    "compression_advice",
    "compute_attention_attribution",
    "layer_similarity",
    "load_record",
    "perplexity_by_cache_size",
    "save_record",
    "simulate_cache",
    "simulate_cake",
]
