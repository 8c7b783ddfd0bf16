"""Recommendations: the change, the line of code, the expected effect, the source."""

from __future__ import annotations

import math

from stabmon._torch.number_formats import LARGEST
from stabmon._torch.snippets import QK_NORM
from stabmon.check.config import CheckConfig
from stabmon.check.judging.findings import Recommendation
from stabmon.check.measuring.expect import LayerView


def lower_init(view: LayerView, config: CheckConfig) -> Recommendation:
    """Recommend smaller initial weights, or normalised queries and keys.

    The weights are to give scores of a third of the critical spread; behind a norm their size does
    not matter.
    """
    spread = float(view.spread[view.widest])
    aim = min(1.0, view.critical / 3)
    factor = math.sqrt(aim / spread)
    return Recommendation(
        f"initialise W_q and W_k {1 / factor:.3g} times smaller, or normalise queries and keys",
        view.layer,
        f"config.initializer_range = {factor:.2g} * config.initializer_range  # or {QK_NORM}",
        f"scores of standard deviation {aim:.2g} instead of {spread:.3g}; qk-norm: 1 whatever the "
        "weights",
        "score deviation M s^2; condensation at sqrt(2 ln n) (Derrida 1981); qk-norm: Dehghani et "
        "al. 2023, arXiv:2302.05442",
    )


def add_scale(view: LayerView) -> Recommendation:
    """Recommend the usual scale of scores."""
    wanted = view.info.head_dim**-0.5
    return Recommendation(
        "divide scores by the root of the head dimension",
        view.layer,
        f"F.scaled_dot_product_attention(q, k, v, scale={wanted:.6g})  # or scores = q @ k.mT * "
        "q.shape[-1] ** -0.5",
        f"scores {abs(view.scale) / wanted:.3g} times smaller, at initialisation and in how fast "
        "they grow",
        "Vaswani et al. 2017, arXiv:1706.03762, 3.2.1",
    )


def fewer_heads(view: LayerView, config: CheckConfig) -> Recommendation:
    """Recommend wider heads over the same model width."""
    width = view.info.heads * view.info.head_dim
    wanted = next(
        (
            each
            for each in (64, 32, config.least_head_dim)
            if width % each == 0 and width >= 2 * each
        ),
        width,
    )
    return Recommendation(
        f"use {width // wanted} heads of dimension {wanted} instead of {view.info.heads} of "
        f"{view.info.head_dim}",
        view.layer,
        f"config.num_attention_heads = {width // wanted}",
        f"score matrices of rank {wanted} at the same number of parameters; kernels run at full "
        "speed from 16 on, in multiples of 8",
        "low-rank bottleneck: Bhojanapalli et al. 2020, arXiv:2002.07028",
    )


def add_norm(view: LayerView) -> Recommendation:
    """Recommend a norm before the projections."""
    return Recommendation(
        "normalise the inputs of the query and key projections",
        view.layer,
        "x = x + attention(norm(x))  # norm = nn.RMSNorm(width) or nn.LayerNorm(width)",
        f"scores {view.input_size**2:.3g} times smaller at initialisation, and none that grow "
        "with the residual stream",
        "pre-norm: Xiong et al. 2020, arXiv:2002.04745",
    )


def repair_head(view: LayerView, head: int, side: str, ratio: float) -> Recommendation:
    """Recommend bringing a head's weights back to the size of the other heads'."""
    places = {} if view.weights is None else view.weights.places
    layer = view.layer.partition("#")[0]
    return Recommendation(
        f"restore the head from an earlier checkpoint, or divide its {side} by {ratio:.3g}",
        f"{view.layer} head {head}",
        "\n".join(
            f'model.get_parameter("{layer}.{name}").data[{rows}] /= {ratio:.3g}'
            for name, rows in places[side][head]
        )
        if side in places
        else f"# divide the rows of head {head} in {side} of {layer} by {ratio:.3g}",
        "its scores come back to the size of the other heads'; while saturated, its rows pass no "
        "gradient and cannot repair themselves",
        "QK-clip: Kimi K2, arXiv:2507.20534",
    )


def avoid_overflow(view: LayerView) -> Recommendation:
    """Recommend an earlier scale, a fused kernel or a wider format."""
    return Recommendation(
        "use a fused kernel or bfloat16, or scale the query before the product",
        view.layer,
        'attn_implementation="sdpa"  # or torch.autocast(..., dtype=torch.bfloat16), '
        "or scores = (q * scale) @ k.mT",
        f"fused: no product is written in float16; scaled first: {1 / view.info.scale:.3g} times "
        "more head-room",
        f"float16 ends at {LARGEST['float16']:.0f}; a score of +inf makes its row NaN",
    )


def keep_bits(view: LayerView, head: int, config: CheckConfig) -> Recommendation:
    """Recommend more bits for forming scores, or smaller scores."""
    share = float(view.measured[f"moved/fused/{config.dtype}"][head])
    if view.info.fused:
        use, code = (
            "float32 for this layer's queries and keys",
            "with torch.autocast(q.device.type, enabled=False): ...  # q, k in float32",
        )
        effect = "rounding of float32 moves less than 0.1 %"
    else:
        use, code = "a fused kernel, which sums in float32", 'attn_implementation="sdpa"'
        effect = f"rounding moves {share:.0%} of a mean row on the fused path"
    return Recommendation(
        f"use {use}, or bring the scores down by query/key normalisation",
        f"{view.layer} head {head}",
        code,
        effect,
        "a score error of eta moves a softmax by at most tanh(eta / 2) in total variation",
    )


def finite_weights(names: str) -> Recommendation:
    """Recommend loading finite weights."""
    return Recommendation(
        "load the last checkpoint whose weights are finite",
        names,
        "assert all(p.isfinite().all() for p in model.parameters())  # before saving",
        "everything computed from a NaN is NaN",
        "IEEE 754",
    )
