"""Effects of a smaller KV cache: eviction policies, budgets, real generation."""

from __future__ import annotations

from stabmon.analysis.kv_cache.cache.compressed import CompressedCache
from stabmon.analysis.kv_cache.generate import CompressedGeneration, compressed_generate
from stabmon.analysis.kv_cache.perplexity import PerplexityTable, perplexity_by_cache_size
from stabmon.analysis.kv_cache.policy import POLICIES, Policy
from stabmon.analysis.kv_cache.report import CakeReport, LayerCache
from stabmon.analysis.kv_cache.simulate import simulate_cache, simulate_cake

__all__ = [
    "POLICIES",
    "CakeReport",
    "CompressedCache",
    "CompressedGeneration",
    "LayerCache",
    "PerplexityTable",
    "Policy",
    "compressed_generate",
    "perplexity_by_cache_size",
    "simulate_cache",
    "simulate_cake",
]
