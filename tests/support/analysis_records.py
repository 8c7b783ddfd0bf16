"""Records of every kind, as the analyses write them, with numbers that tests know."""

from __future__ import annotations

from typing import Any

import numpy as np

from stabmon.analysis.record import AnalysisRecord

LAYERS = ["model.layers.0.self_attn", "model.layers.1.self_attn"]
HOSTILE = [
    "<script>alert(1)</script>",
    "</script>",
    "\n",
    " שלום",
    "😀",
    "$x$",
    "&amp;",
    "\ud800",
    "a" * 300,
    " the",
]
"""Tokens that would break a page or a figure that trusts them."""


def causal(heads: int, side: int, seed: int = 0) -> np.ndarray:
    """``[H, S, S]`` float32, rows sum to 1, nothing above the diagonal."""
    weights = np.tril(np.random.default_rng(seed).random((heads, side, side)))
    found: np.ndarray = (weights / weights.sum(-1, keepdims=True)).astype(np.float32)
    return found


def heatmap(side: int = 10, heads: int = 2, **more: Any) -> AnalysisRecord:
    maps = {layer: causal(heads, side, at) for at, layer in enumerate(LAYERS)}
    values = {
        "sample": 0,
        "layers": LAYERS,
        "pooling": {layer: [1, 1] for layer in LAYERS},
        "sizes": {layer: [side, side] for layer in LAYERS},
        "model": "a model",
        "tokens": [(HOSTILE * side)[:side]],
        **more,
    }
    return AnalysisRecord(
        "heatmap", values, {f"maps/{layer}": each for layer, each in maps.items()}
    )


def rollout(share: float = 0.2, samples: int = 2, side: int = 10, **more: Any) -> AnalysisRecord:
    """Every row gives ``share`` to the first token and the rest evenly to the tokens up to
    itself.
    """
    matrix = np.zeros((samples, side, side), dtype=np.float32)
    for row in range(side):
        matrix[:, row, : row + 1] = (1 - share) / max(1, row)
        matrix[:, row, 0] = share if row else 1.0
    values = {
        "stack": "model.layers",
        "stacks": ["model.layers"],
        "layers": LAYERS,
        "residual": 0.5,
        "start_layer": 0,
        "head_fusion": "mean",
        "weighting": None,
        "method": "rollout of 2 layers",
        "targets": None,
        "sources": None,
        "first_token_share": matrix[:, :, 0].tolist(),
        "batch_size": samples,
        "image_grid": None,
        "attribution": {"mean_attention": 0.1, "rollout_entropy": 1.5},
        "faithfulness": None,
        "model": "a model",
        "tokens": [(HOSTILE * side)[:side] for _ in range(samples)],
        **more,
    }
    ones = np.ones((samples, side), dtype=np.uint8)
    return AnalysisRecord(
        "rollout", values, {"matrix": matrix, "valid": ones, "source_valid": ones}
    )


def images() -> AnalysisRecord:
    """One image of 2 × 2 patches behind a class token that owes to them 0.1, 0.2, 0.3 and 0.2."""
    record = rollout(
        samples=1, side=5, image_grid={"rows": 2, "cols": 2, "leading": 1}, tokens=None
    )
    matrix = record.arrays["matrix"].copy()
    matrix[0, 0] = [0.2, 0.1, 0.2, 0.3, 0.2]
    picture = np.random.default_rng(0).integers(0, 255, (1, 8, 8, 3)).astype(np.uint8)
    return AnalysisRecord(
        "rollout", record.values, {**record.arrays, "matrix": matrix, "images": picture}
    )


def cake(worse: float = -0.1, samples: int = 2) -> AnalysisRecord:
    """CAKE costs ``worse`` nats more than recency at every size."""
    side, fed, heads = 40, 3, 2
    arrays = {
        name: np.array([[1.0] * samples, [3.0] * samples])
        for name in ("dispersion", "shift", "preference")
    }
    arrays["budget"] = np.array([[6] * samples, [10] * samples])
    arrays["preserved"] = np.broadcast_to(
        np.array([0.6, 0.4, 0.7])[None, :, None, None], (2, 3, 3, samples)
    ).copy()
    rng = np.random.default_rng(0)
    for layer in LAYERS:
        went = np.where(rng.random((samples, heads, side + fed)) < 0.5, 0, -1).astype(np.int32)
        went[..., side - 4 :] = -1
        went[..., 20] = 2
        arrays[f"evicted_at/{layer}"] = went
        arrays[f"scores/{layer}"] = rng.random((samples, heads, side))
        arrays[f"kept/{layer}"] = np.zeros((samples, heads, 14), dtype=np.int64)
    arrays["perplexity_nats"] = np.array([[[2.0 + worse] * samples] * 2, [[2.0] * samples] * 2])
    arrays["perplexity_full_nats"] = np.full(samples, 1.5)
    values = {
        "policy": "cake",
        "settings": {"tau1": 1.0, "allotment": "filled"},
        "cache_size": 12,
        "window_size": 4,
        "layers": LAYERS,
        "left_out": {"model.layers.2.self_attn": "a sliding window"},
        "lengths": [side] * samples,
        "sizes": [12] * samples,
        "steps": fed,
        "compression_ratio": 0.3,
        "eviction_frequency": 1.0,
        "budget_use": 1.0,
        "perplexity": 8.0,
        "full_perplexity": 7.5,
        "choices": ["kept", "recency", "best"],
        "measures": ["mass", "entropy", "variance"],
        "notes": ["a note"],
        "perplexity_policies": ["cake", "recency"],
        "perplexity_sizes": [12, 0.5],
        "perplexity_context": 40,
        "perplexity_continuation": 8,
        "model": "a model",
    }
    return AnalysisRecord("cake", values, arrays)


def evolution() -> AnalysisRecord:
    """Over three steps the second layer's entropy falls from 0.9 to 0.3; a fourth key comes
    last.
    """
    names = ["normalized_entropy", "sink_mass"]
    arrays = {}
    for at, layer in enumerate(LAYERS):
        values = np.zeros((2, 3, 1, 2))
        values[0] = np.array([0.9, 0.6, 0.3])[:, None, None] if at else 0.5
        arrays[f"statistics/{layer}"] = values
        rows = np.full((3, 1, 4), 0.25, dtype=np.float32)
        rows[0, 0, 3] = np.nan
        arrays[f"rows/{layer}"] = rows
    values_of = {"over": "generation", "steps": [0, 1, 2], "layers": LAYERS, "names": names}
    more = {"over_queries_names": [], "roles": [], "notes": [], "tokens": [HOSTILE[:4]]}
    return AnalysisRecord("evolution", {**values_of, **more}, arrays)
