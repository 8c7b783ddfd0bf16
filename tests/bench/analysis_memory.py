"""Measure the memory of attribution above a plain forward.

python tests/bench/analysis_memory.py [--part batch|length|gradient] [--layers 28 --heads 16
    --tokens 256 --samples 32]

Each way runs in a process of its own. ``batch``: the rollout of a batch, by all maps kept
(``output_attentions``, eager), by a loop over kept maps that frees each, and by stabmon.
``length``: one target at growing lengths, beside the queries and keys of all layers. ``gradient``:
the same weighted by gradients, beside queries, keys, values and gradients (the graph of the forward
comes on top). Memory is the peak of the resident set (VmHWM, reset before each measurement) less
that of a plain forward under sdpa in the same process, in MB of 2**20 bytes.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

MB = 2**20
LENGTHS = (1024, 2048, 4096, 8192)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--part",
        choices=("batch", "length", "gradient"),
        action="append",
        help="which part to run; all without",
    )
    parser.add_argument("--layers", type=int, default=28)
    parser.add_argument("--heads", type=int, default=16)
    parser.add_argument("--head-dim", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--samples", type=int, default=32)
    parser.add_argument("--lengths", type=int, nargs="+", default=list(LENGTHS))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measured(json.loads(given.child))))
        return
    parts = given.part or ["batch", "length", "gradient"]
    if "batch" in parts:
        shape = {
            "layers": given.layers,
            "heads": given.heads,
            "kv_heads": given.heads,
            "head_dim": given.head_dim,
        }
        print(
            f"rollout of {given.samples} x {given.tokens} tokens, {given.layers} layers x "
            f"{given.heads} heads"
        )
        print(
            f"{'':34}{'MB above':>10}{'forward MB':>12}{'s':>8}{'forward s':>11}{'max error':>11}"
        )
        for name in (
            "all maps kept",
            "loop that frees each map",
            "stabmon",
            "stabmon, eight numbers",
        ):
            row = child({"way": name, **shape, "tokens": given.tokens, "samples": given.samples})
            print(
                f"{name:34}{row['above']:10.1f}{row['forward_mb']:12.1f}"
                f"{row['seconds']:8.1f}{row['forward_s']:11.1f}"
                f"{row['error']:11.1e}",
                flush=True,
            )
    for part, way, heads in (
        ("length", "target", 8 + 4),
        ("gradient", "gradient target", 8 + 4 + 4 + 8),
    ):
        if part not in parts:
            continue
        held = "q, k" if part == "length" else "q k v g"
        print(f"one {way}, 8 layers x 8 heads (4 key heads) of 64, one sample")
        print(
            f"{'S':>8}{'MB above':>10}{held + ' MB':>12}{'MB beyond':>11}{'s':>8}{'forward s':>11}"
        )
        for tokens in given.lengths:
            shape = {
                "layers": 8,
                "heads": 8,
                "kv_heads": 4,
                "head_dim": 64,
                "tokens": tokens,
                "samples": 1,
            }
            row = child({"way": way, **shape})
            kept = 8 * tokens * heads * 64 * 4 / MB
            print(
                f"{tokens:8}{row['above']:10.1f}{kept:12.1f}{row['above'] - kept:11.1f}"
                f"{row['seconds']:8.1f}{row['forward_s']:11.1f}",
                flush=True,
            )


def child(options: dict[str, Any]) -> dict[str, float]:
    """Measure in a fresh process whose allocator returns large blocks at once."""
    root = Path(__file__).parents[2]
    own = {
        "MALLOC_MMAP_THRESHOLD_": "131072",
        "MALLOC_TRIM_THRESHOLD_": "131072",
        "OMP_NUM_THREADS": "1",
    }
    environment = {
        **os.environ,
        **own,
        "PYTHONPATH": f"{root}:{os.environ.get('PYTHONPATH', '')}",
        "TRANSFORMERS_VERBOSITY": "error",
    }
    command = [sys.executable, __file__, "--child", json.dumps(options)]
    done = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True)
    found: dict[str, float] = json.loads(done.stdout.splitlines()[-1])
    return found


def measured(options: dict[str, Any]) -> dict[str, float]:
    """Return the peak above a plain forward, and the times."""
    way = options["way"]
    model, batch = make(options, eager=way in ("all maps kept", "loop that frees each map"))
    plain, _ = make(options, eager=False)
    run = WAYS[way]
    small = {"input_ids": batch["input_ids"][:1, :8]}
    run(model, small)  # imports, and what is made once
    plain_peak, forward_s = 0.0, 0.0
    for _ in range(2):
        plain_peak, forward_s, _ = peak(lambda: forward(plain, batch))
    method_peak, seconds, result = peak(lambda: run(model, batch))
    error = 0.0
    if isinstance(result, Tensor) and result.shape[1] == result.shape[2]:
        sample = {"input_ids": batch["input_ids"][-1:]}
        eager, _ = make(options, eager=True)
        error = float((reference(eager.double(), sample) - result[-1:]).abs().max())
    return {
        "above": (method_peak - plain_peak) / MB,
        "forward_mb": plain_peak / MB,
        "seconds": seconds,
        "forward_s": forward_s,
        "error": error,
    }


def make(options: dict[str, Any], *, eager: bool) -> tuple[Any, dict[str, Tensor]]:
    from transformers import LlamaConfig, LlamaForCausalLM

    width = options["heads"] * options["head_dim"]
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=options["layers"],
        num_attention_heads=options["heads"],
        num_key_value_heads=options["kv_heads"],
        head_dim=options["head_dim"],
        max_position_embeddings=options["tokens"],
        attn_implementation="eager" if eager else "sdpa",
    )
    torch.manual_seed(0)
    model = LlamaForCausalLM(config).eval()
    ids = torch.randint(
        0, 256, (options["samples"], options["tokens"]), generator=torch.Generator().manual_seed(0)
    )
    return model, {"input_ids": ids}


def forward(model: Any, batch: dict[str, Tensor]) -> None:
    with torch.no_grad():
        model(**batch, use_cache=False)


def keep_all(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Roll out the textbook way: keep all maps, then multiply them."""
    with torch.no_grad():
        maps = model(**batch, output_attentions=True, use_cache=False).attentions
        return product([each.mean(1) for each in maps])


def loop(model: Any, batch: dict[str, Tensor]) -> Tensor:
    """Roll out the older tool's way: keep all maps, free one after another."""
    with torch.no_grad():
        maps = list(model(**batch, output_attentions=True, use_cache=False).attentions)
        rollout = None
        for index, each in enumerate(maps):
            mixed = each.mean(1).mul_(0.5)
            mixed.diagonal(dim1=1, dim2=2).add_(0.5)
            rollout = mixed if rollout is None else torch.bmm(mixed, rollout)
            maps[index] = None  # type: ignore[call-overload]
            del each
        assert rollout is not None
        return rollout


def ours(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from stabmon.analysis.rollout.api import attention_rollout

    return attention_rollout(model, batch).matrix


def eight_numbers(model: Any, batch: dict[str, Tensor]) -> None:
    from stabmon.analysis.attribution.summary import compute_attention_attribution

    compute_attention_attribution(model, batch)


def target(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from stabmon.analysis.rollout.api import attention_rollout

    return attention_rollout(model, batch, targets=-1).matrix


def gradient_target(model: Any, batch: dict[str, Tensor]) -> Tensor:
    from stabmon.analysis.rollout.api import attention_rollout

    return attention_rollout(model, batch, targets=-1, weighting="gradient").matrix


def reference(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with torch.no_grad():
        return product(
            [
                each.double().mean(1)
                for each in model(**batch, output_attentions=True, use_cache=False).attentions
            ]
        )


def product(maps: list[Tensor]) -> Tensor:
    identity = torch.eye(maps[0].shape[-1], dtype=maps[0].dtype)
    rollout = identity
    for each in maps:
        rollout = (0.5 * each + 0.5 * identity) @ rollout
    return rollout


WAYS: dict[str, Callable[[Any, dict[str, Tensor]], Any]] = {
    "all maps kept": keep_all,
    "loop that frees each map": loop,
    "stabmon": ours,
    "stabmon, eight numbers": eight_numbers,
    "target": target,
    "gradient target": gradient_target,
}


def peak(run: Callable[[], Any]) -> tuple[float, float, Any]:
    """Return the largest resident set of ``run`` in bytes, its seconds and its value."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM (Linux)
    start = time.perf_counter()
    result = run()
    seconds = time.perf_counter() - start
    lines = Path("/proc/self/status").read_text().splitlines()
    high = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    return float(high), seconds, result


if __name__ == "__main__":
    main()
