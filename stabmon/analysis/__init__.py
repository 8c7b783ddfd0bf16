"""Analysis of any model's attention: attribution, patterns, compressed KV caches.

>>> import torch
>>> from stabmon.analysis import attention_rollout
>>> attention_rollout([torch.full((4, 4), 0.25)] * 2).first_token_share[0, -1].item()
0.1875
"""

from stabmon.analysis.attribution.faithfulness import Faithfulness, deletion_check
from stabmon.analysis.attribution.generation import GenerationAttribution, generation_attribution
from stabmon.analysis.attribution.summary import (
    AttributionSummary,
    aggregate_attribution,
    compute_attention_attribution,
)
from stabmon.analysis.compression.advice import compression_advice
from stabmon.analysis.compression.recommendation import CompressionAdvice, Recommendation
from stabmon.analysis.kv_cache import (
    CakeReport,
    CompressedCache,
    LayerCache,
    PerplexityTable,
    compressed_generate,
    perplexity_by_cache_size,
    simulate_cache,
    simulate_cake,
)
from stabmon.analysis.patterns.api import attention_patterns
from stabmon.analysis.patterns.evolution import (
    PatternEvolution,
    patterns_over_checkpoints,
    patterns_over_training,
)
from stabmon.analysis.patterns.generation import patterns_over_generation
from stabmon.analysis.patterns.head_roles import HeadRole
from stabmon.analysis.patterns.insights import Insight
from stabmon.analysis.patterns.maps import AttentionMaps, attention_maps
from stabmon.analysis.patterns.neurons import ScoreContributions, score_contributions
from stabmon.analysis.patterns.result import AttentionPatterns
from stabmon.analysis.patterns.similarity import LayerSimilarity, layer_similarity
from stabmon.analysis.record import AnalysisRecord, load_record, save_record
from stabmon.analysis.rollout.api import attention_rollout
from stabmon.analysis.rollout.result import Rollout

__all__ = [
    "AnalysisRecord",
    "AttentionMaps",
    "AttentionPatterns",
    "AttributionSummary",
    "CakeReport",
    "CompressedCache",
    "CompressionAdvice",
    "Faithfulness",
    "GenerationAttribution",
    "HeadRole",
    "Insight",
    "LayerCache",
    "LayerSimilarity",
    "PatternEvolution",
    "PerplexityTable",
    "Recommendation",
    "Rollout",
    "ScoreContributions",
    "aggregate_attribution",
    "attention_maps",
    "attention_patterns",
    "attention_rollout",
    "compressed_generate",
    "compression_advice",
    "compute_attention_attribution",
    "deletion_check",
    "generation_attribution",
    "layer_similarity",
    "load_record",
    "patterns_over_checkpoints",
    "patterns_over_generation",
    "patterns_over_training",
    "perplexity_by_cache_size",
    "save_record",
    "score_contributions",
    "simulate_cache",
    "simulate_cake",
]
