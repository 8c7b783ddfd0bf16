"""Compare the verdicts of `stabmon check` with real training.

python tests/bench/check_table.py [--seconds 40] [--only NAME ...]

Healthy and broken configs, each in a precision. Each config is checked at its length and precision,
then trained for real in that precision (autocast, float32 weights, a gradient scaler for float16,
AdamW) for a number of steps that fits the time. Its *gap* is its final training loss minus that of
its paired run: the same family as it should be, in float32, on the same data from the same seed.
"Trains" is a finite loss and a gap below 0.15 nats; beside the gap stands by how much two seeds of
the paired run differ. A pass is borne out by a run that trains, a fail by one that does not; a
warning claims neither. Nothing here is fed back into the check.
"""

from __future__ import annotations

if not __package__:
    import on_path  # noqa: F401

import argparse
import contextlib
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stabmon
from tests.bench.albert import REACTIONS, load_albert

WIDTH, LAYERS, HEADS, VOCABULARY = 128, 2, 2, 256
GAP = 0.15
"""Nats above the paired run's final loss from which a run counts as damaged."""
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
Batch = dict[str, Tensor]


class Attention(nn.Module):
    """Attention by hand with torch's own initialisation of linear maps.

    Optionally without a scale, as where somebody forgot it.
    """

    def __init__(self, scaled: bool) -> None:
        super().__init__()
        self.num_heads, self.scaled = HEADS, scaled
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH, bias=False), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            part.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)
            for part in self.qkv(x).chunk(3, dim=-1)
        )
        mixed = F.scaled_dot_product_attention(
            q, k, v, is_causal=True, scale=q.shape[-1] ** -0.5 if self.scaled else 1.0
        )
        out: Tensor = self.out(mixed.transpose(1, 2).flatten(-2))
        return out


class HandWritten(nn.Module):
    """A causal transformer by hand.

    Without ``norm`` attention reads the bare residual stream, embeddings of size 3.
    """

    def __init__(self, *, scaled: bool = True, norm: bool = True) -> None:
        super().__init__()
        self.norm = norm
        self.embedding, self.position = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(512, WIDTH)
        if not norm:
            nn.init.normal_(self.embedding.weight, std=3.0)
        self.attention = nn.ModuleList(Attention(scaled) for _ in range(LAYERS))
        self.mlp = nn.ModuleList(
            nn.Sequential(
                nn.LayerNorm(WIDTH),
                nn.Linear(WIDTH, 4 * WIDTH),
                nn.GELU(),
                nn.Linear(4 * WIDTH, WIDTH),
            )
            for _ in range(LAYERS)
        )
        self.head = nn.Sequential(nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY))

    def forward(self, input_ids: Tensor, labels: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.position(
            torch.arange(input_ids.shape[1], device=input_ids.device)
        )
        for attention, mlp in zip(self.attention, self.mlp, strict=True):
            x = x + attention(F.layer_norm(x, (WIDTH,)) if self.norm else x)
            x = x + mlp(x)
        return F.cross_entropy(self.head(x)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())


@dataclass(frozen=True)
class Case:
    """One row of the table."""

    name: str
    make: Callable[[], Any]
    dtype: str
    expect: str | None
    """Finding to be named; None for a healthy config, which must pass."""
    paired: Callable[[], Any]
    length: int = 128
    rate: float = 1e-3
    batch: int = 8
    checked_for: int | None = None
    """Length to check for, where it is beyond what can be trained here."""


def gpt2(attention: str = "sdpa", **changes: Any) -> Callable[[], Any]:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {
        "n_embd": WIDTH,
        "n_layer": LAYERS,
        "n_head": HEADS,
        "n_positions": 1024,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    drops = {"attn_pdrop": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "loss_type": "ForCausalLM"}
    tokens = {"bos_token_id": 1, "eos_token_id": 2}
    config = GPT2Config(**(sizes | drops | tokens | changes))
    # _from_config: the constructor with an attention implementation; checked with transformers 5.23
    return lambda: GPT2LMHeadModel._from_config(config, attn_implementation=attention)


def of_llama_kind(name: str, attention: str = "sdpa", **changes: Any) -> Callable[[], Any]:
    import transformers

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    more = {
        "num_key_value_heads": 1,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 131_072,
        "use_cache": False,
        "head_dim": 64,
    }
    config = getattr(transformers, f"{name}Config")(**(sizes | more | changes))
    # see above for _from_config
    return lambda: getattr(transformers, f"{name}ForCausalLM")._from_config(
        config, attn_implementation=attention
    )


def wider(make: Callable[[], Any]) -> Callable[[], Any]:
    """Make queries and keys with weights ten times as large."""

    def changed() -> Any:
        model = make()
        with torch.no_grad():
            for layer in model.model.layers:
                layer.self_attn.q_proj.weight *= 10
                layer.self_attn.k_proj.weight *= 10
        return model

    return changed


def bloom() -> Any:
    from transformers import BloomConfig, BloomForCausalLM

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "n_layer": LAYERS,
        "n_head": 4,
        "vocab_size": VOCABULARY,
        "use_cache": False,
    }
    return BloomForCausalLM(BloomConfig(hidden_dropout=0.0, attention_dropout=0.0, **sizes))


def bert() -> Any:
    from transformers import BertConfig, BertForMaskedLM

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    drops = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes, **drops))


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    sizes: dict[str, Any] = {
        "hidden_size": WIDTH,
        "intermediate_size": 4 * WIDTH,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
    }
    return ViTForImageClassification(ViTConfig(image_size=32, patch_size=4, num_labels=4, **sizes))


def albert(factor: float = 1.0) -> Any:
    model, _ = load_albert()
    groups: Any = model.albert.encoder.albert_layer_groups
    attention = groups[0].albert_layers[0].attention
    rows = slice(3 * 32, 4 * 32)
    with torch.no_grad():
        attention.query.weight[rows] *= factor
        attention.query.bias[rows] *= factor
    return model


def cases() -> list[Case]:
    found = []
    healthy: dict[str, tuple[Callable[[], Any], int]] = {
        "gpt2": (gpt2(), 128),
        "gpt2, eager": (gpt2("eager"), 128),
        "llama, grouped heads": (of_llama_kind("Llama"), 128),
        "qwen3, qk-norm": (of_llama_kind("Qwen3"), 128),
        "bert": (bert, 128),
        "vit": (vit, 65),
        "by hand": (HandWritten, 128),
    }
    for name, (make, length) in healthy.items():
        found += [Case(name, make, dtype, None, make, length) for dtype in DTYPES]
    found += [
        Case("albert, trained", albert, dtype, None, albert, 95, rate=1e-4) for dtype in DTYPES
    ]
    long = of_llama_kind("Llama")
    found += [
        Case(
            "llama, for 128k (run at 1024)",
            long,
            "bf16",
            None,
            long,
            1024,
            batch=1,
            checked_for=131_072,
        ),
        Case("init std x 10", gpt2(initializer_range=0.2), "fp32", "saturated_softmax", gpt2()),
        Case("W_q and W_k x 10", wider(long), "fp32", "saturated_softmax", long),
        Case(
            "W_q and W_k x 10, qk-norm",
            wider(of_llama_kind("Qwen3")),
            "fp32",
            None,
            of_llama_kind("Qwen3"),
        ),
        Case("no scale", lambda: HandWritten(scaled=False), "fp32", "scale_missing", HandWritten),
        Case(
            "no scale, rate x 4",
            lambda: HandWritten(scaled=False),
            "fp32",
            "scale_missing",
            HandWritten,
            rate=4e-3,
        ),
        Case(
            "no norm before",
            lambda: HandWritten(norm=False),
            "fp32",
            "inputs_not_normalised",
            HandWritten,
        ),
        Case("head dim 2", gpt2(n_head=64), "fp32", "head_dim_too_small", gpt2()),
        Case(
            "init std x 300, eager",
            gpt2("eager", initializer_range=6.0),
            "fp16",
            "overflow_risk",
            gpt2("eager"),
        ),
        Case(
            "init std x 300, eager",
            gpt2("eager", initializer_range=6.0),
            "bf16",
            "saturated_softmax",
            gpt2("eager"),
        ),
        Case(
            "bloom, absolute ALiBi, long",
            bloom,
            "bf16",
            "precision_insufficient",
            bloom,
            1024,
            batch=1,
        ),
        Case("bloom, absolute ALiBi, long", bloom, "fp32", None, bloom, 1024, batch=1),
        Case(
            "albert, one head's W_q x 50",
            lambda: albert(50.0),
            "fp32",
            "damaged_head",
            albert,
            95,
            rate=1e-4,
        ),
    ]
    return found


def batches(case: Case, model: Any, count: int, seed: int) -> list[Batch]:
    """Return the same data for a case and its paired run."""
    generator = torch.Generator().manual_seed(seed)
    name = type(model).__name__
    if name.startswith("ViT"):
        prototypes = torch.randn(4, 3, 32, 32, generator=torch.Generator().manual_seed(99))
        made = []
        for _ in range(count):
            labels = torch.randint(0, 4, (case.batch,), generator=generator)
            noise = torch.randn(case.batch, 3, 32, 32, generator=generator)
            made.append({"pixel_values": prototypes[labels] * 0.2 + noise, "labels": labels})
        return made
    if name.startswith("Albert"):
        _, encode = load_albert()
        whole = encode(REACTIONS)
        return [
            _masked(whole["input_ids"], whole["attention_mask"], generator, 4) for _ in range(count)
        ]
    from stabmon.tiny.corpus import load_corpus

    corpus = load_corpus(block=case.length)
    picked = corpus.stream(count, case.batch, seed)
    rows = [corpus.train[index] for index in picked]
    if name.startswith("Bert"):
        return [_masked(ids, torch.ones_like(ids), generator, 1) for ids in rows]
    return [{"input_ids": ids, "labels": ids} for ids in rows]


def _masked(ids: Tensor, visible: Tensor, generator: torch.Generator, mask: int) -> Batch:
    """Hide a sixth of the visible tokens and ask for them."""
    hidden = (torch.rand(ids.shape, generator=generator) < 0.15) & visible.bool()
    hidden[:, 1] = True
    labels = torch.where(hidden, ids, -100)
    return {
        "input_ids": torch.where(hidden, mask, ids),
        "attention_mask": visible,
        "labels": labels,
    }


def train(
    case: Case, make: Callable[[], Any], dtype: str, seed: int, seconds: float, most: int
) -> tuple[list[float], int]:
    """Train; return the loss of each step and the number of skipped gradients.

    Gradients that are not finite are skipped.
    """
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = make().train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    data = batches(case, model, most, seed)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=case.rate, betas=(0.9, 0.95), weight_decay=0.1
    )
    scaler = torch.amp.GradScaler("cpu", enabled=dtype == "fp16")
    losses, skipped, started = [], 0, time.monotonic()
    for step, batch in enumerate(data):
        for group in optimizer.param_groups:
            group["lr"] = case.rate * min(1.0, (step + 1) / 20)
        half = (
            contextlib.nullcontext()
            if dtype == "fp32"
            else torch.autocast("cpu", dtype=DTYPES[dtype])
        )
        with half:
            out = model(**batch)
        loss = out if isinstance(out, Tensor) else out.loss
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        norm = nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        skipped += not bool(norm.isfinite())
        scaler.step(optimizer)
        scaler.update()
        losses.append(loss.item())
        if not math.isfinite(losses[-1]) or time.monotonic() - started > seconds:
            break
    return losses, skipped


def final(losses: list[float], steps: int) -> float:
    """Return the mean of the last quarter of the first ``steps`` losses."""
    tail = losses[:steps][-max(1, steps // 4) :]
    return statistics.fmean(tail) if all(map(math.isfinite, tail)) else math.nan


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=40, help="for each training run")
    parser.add_argument("--steps", type=int, default=300, help="at most, for each training run")
    parser.add_argument("--only", nargs="*", help="words that a row's name must hold")
    asked = parser.parse_args()
    paired_runs: dict[tuple[str, int, float], list[list[float]]] = {}
    wrong, unborne = 0, 0
    print(
        "| config | precision | verdict | finding named | trained | steps | loss | "
        "gap to paired run "
        "(its own spread) | borne out |"
    )
    print("| --- | --- | --- | --- | --- | --- | --- | --- | --- |")
    for case in cases():
        if asked.only and not any(word in case.name for word in asked.only):
            continue
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = case.make().eval()
        report = stabmon.check_attention_stability(
            model, batches(case, model, 1, 0)[0], {"dtype": case.dtype, "seq_len": case.checked_for}
        )
        named = [
            f"{each.name} ({each.severity})" for each in report.findings if each.severity != "info"
        ]
        healthy = next(
            (
                other.name
                for other in cases()
                if other.make is case.paired or other.paired is case.paired
            ),
            case.name,
        )
        key = (healthy, case.length, case.rate)
        if key not in paired_runs:
            paired_runs[key] = [
                train(case, case.paired, "fp32", seed, asked.seconds, asked.steps)[0]
                for seed in (0, 1)
            ]
        losses, skipped = train(case, case.make, case.dtype, 0, asked.seconds, asked.steps)
        steps = (
            min(len(losses), *(len(each) for each in paired_runs[key]))
            if all(map(math.isfinite, losses))
            else len(losses)
        )
        ends = [final(each, min(steps, len(each))) for each in paired_runs[key]]
        gap = final(losses, steps) - ends[0]
        trains = math.isfinite(gap) and gap < GAP
        borne = (
            "a warning"
            if report.verdict == "warn"
            else "yes"
            if (report.verdict == "pass") == trains
            else "NO"
        )
        named_right = (case.expect is None and report.verdict == "pass") or any(
            each.name == case.expect for each in report.findings
        )
        wrong += not named_right
        unborne += borne == "NO"
        done = f"{len(losses)} ({skipped} skipped)" if skipped else str(len(losses))
        spread = abs(ends[1] - ends[0])
        cells = (
            case.name,
            case.dtype,
            report.verdict,
            ", ".join(named) or "–",
            "yes" if trains else "NO",
            done,
        )
        print(
            f"| {' | '.join(cells)} | {final(losses, steps):.3f} | {gap:+.3f} ({spread:.3f}) | "
            f"{borne} |",
            flush=True,
        )
    print(
        f"\n{wrong} rows in which the finding that belongs to the config was not named, or a "
        "healthy one did not pass"
    )
    print(f"{unborne} rows whose verdict, pass or fail, the training run does not bear out")
    return int(wrong + unborne > 0)


if __name__ == "__main__":
    sys.exit(main())
