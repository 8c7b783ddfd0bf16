"""Recipes chosen by hand."""

from __future__ import annotations

from typing import Any

from tests.bench.byte_gpt.recipe import Fault, Recipe, own_pair


def chosen() -> list[Recipe]:
    """Return the 69 recipes that are chosen by hand."""
    return _healthy() + _growing() + _sharp() + _in_formats() + _not_attention()


def _healthy() -> list[Recipe]:
    noise = (Fault("random_batch", 200, 201),)
    return [
        own_pair("base"),
        Recipe("qkn", qk_norm=True),
        Recipe("wd.1", weight_decay=0.1),
        Recipe("b2.999", beta2=0.999),
        Recipe("lr6e-3", rate=6e-3),
        Recipe("lr.01", rate=1e-2, without_growth="lr.01_qkn"),
        Recipe("lr.01_qkn", rate=1e-2, qk_norm=True),
        Recipe("lr.03_qkn", rate=3e-2, qk_norm=True),
        own_pair("learned", position="learned"),
        own_pair("code", text="code"),
        own_pair("copy", text="copy"),
        own_pair("prev", text="sum"),
        own_pair("T8", length=8, batch=64),
        own_pair("win4", window=4),
        own_pair("alibi8", position="alibi", alibi=8.0),
        own_pair("sink12", sink=12.0),
        Recipe("bad1", faults=noise),
        own_pair("sgd.5", optimizer="sgd", rate=0.5, clip=0.0),
        Recipe("ac_bf16", precision="autocast_bfloat16"),
        Recipe("ac_fp16", precision="autocast_float16"),
        Recipe("bf16w", precision="bfloat16_weights"),
        Recipe("qkn_scale4", qk_norm=True, scale=4.0),
        own_pair("h16", heads=16),
        own_pair("long", steps=1000, rate=6e-3),
    ]


def _growing() -> list[Recipe]:
    """Scores that grow by too high a rate."""
    ramp: dict[str, Any] = {"warmup": 400, "schedule": "constant"}
    return [
        Recipe("lr.03", rate=3e-2, without_growth="lr.03_qkn"),
        Recipe("lr.1", rate=1e-1, without_growth="lr.1_qkn"),
        Recipe("lrqk10", query_key_rate=10.0, without_growth="base"),
        Recipe("lrqk30", query_key_rate=30.0, without_growth="base"),
        Recipe("lrqk100", query_key_rate=100.0, without_growth="base"),
        Recipe("lrqk30_late", query_key_rate=30.0, query_key_rate_from=150, without_growth="base"),
        Recipe("ramp.03", rate=3e-2, without_growth="ramp.03_qkn", **ramp),
        Recipe("ramp.1", rate=1e-1, without_growth="ramp.1_qkn", **ramp),
        Recipe("b2_w0", rate=1e-2, beta2=0.999, warmup=0, without_growth="b2_w0_qkn"),
    ]


def _sharp() -> list[Recipe]:
    """Temperatures and initialisations that saturate the softmax."""
    return [
        *(Recipe(f"scale{n}", scale=float(n), without_growth="base") for n in (4, 10, 30)),
        *(Recipe(f"qkinit{n}", query_key_init=float(n), without_growth="base") for n in (2, 4, 8)),
        Recipe("copy_scale10", paired="copy", without_growth="copy", text="copy", scale=10.0),
        Recipe("grow_e", scale_ramp=(30, 120, 100.0), without_growth="base"),
        Recipe("grow30_l", scale_ramp=(150, 350, 30.0), without_growth="base"),
        Recipe("grow1000", scale_ramp=(150, 300, 1000.0), without_growth="base"),
    ]


def _in_formats() -> list[Recipe]:
    """Scores that overflow their format, or lose their digits in it."""
    ramp: dict[str, Any] = {"rate": 1e-1, "warmup": 400, "schedule": "constant"}
    half: dict[str, Any] = {"precision": "float16_scores"}
    plain: dict[str, Any] = {"precision": "exp_float32"}
    return [
        Recipe("n32_base", without_growth="base", **plain),
        Recipe("n32_lr.01", rate=1e-2, without_growth="lr.01", **plain),
        Recipe("n32_lrqk10", query_key_rate=10.0, without_growth="lrqk10", **plain),
        Recipe("n16", precision="exp_float16", without_growth="base"),
        Recipe("fp16_lr.1", rate=1e-1, without_growth="lr.1_qkn", **half),
        Recipe("fp16_ramp.1", without_growth="ramp.1_qkn", **half, **ramp),
        Recipe("bf16_scale30", precision="bfloat16_scores", scale=30.0, without_growth="base"),
    ]


def _not_attention() -> list[Recipe]:
    spike: dict[str, Any] = {"faults": (Fault("rate", 150, 170, 100.0),)}
    sgd: dict[str, Any] = {"optimizer": "sgd", "rate": 1.0, "clip": 0.0}
    post: dict[str, Any] = {"post_norm": True, "rate": 3e-2, "warmup": 0}
    ramp: dict[str, Any] = {"warmup": 400, "schedule": "constant", "qk_norm": True}

    def late(name: str, fault: str, stop: int = 400, value: float = 1.0, **how: Any) -> Recipe:
        return Recipe(name, faults=(Fault(fault, 200, stop, value),), **how)

    return [
        late("d_noise", "random_labels"),
        late("d_wd", "weight_decay", value=30.0),
        late("d_lrmlp", "rate:mlp", 220, 1000.0),
        late("d_lrhead", "rate:head", value=300.0),
        late("d_emb", "embedding", 201, 1000.0),
        late("d_lremb", "rate:embedding", value=3000.0),
        late("d_embnan", "embedding_nan", 201),
        late("d_fp16mlp", "mlp", 201, 1e5, precision="float16_mlp"),
        Recipe("d_sgd1", without_growth="d_sgd1_qkn", **sgd),
        Recipe("d_sgd1_qkn", qk_norm=True, **sgd),
        Recipe("d_spike100", without_growth="d_spike100_qkn", **spike),
        Recipe("d_spike100_qkn", qk_norm=True, **spike),
        Recipe("d_postln", without_growth="d_postln_qkn", **post),
        Recipe("d_postln_qkn", qk_norm=True, **post),
        Recipe("lr.1_qkn", rate=1e-1, qk_norm=True),
        Recipe("ramp.03_qkn", rate=3e-2, **ramp),
        Recipe("ramp.1_qkn", rate=1e-1, **ramp),
        Recipe("b2_w0_qkn", rate=1e-2, beta2=0.999, warmup=0, qk_norm=True),
        Recipe("lr.3_qkn", rate=3e-1, qk_norm=True),
    ]
