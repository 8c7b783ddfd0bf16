"""Score continuations with kvpress' caches.

Run by kv_cache.py --peer in a virtual environment of its own.

python -m venv peer && peer/bin/pip install kvpress==0.5.5 "transformers==5.2.0" torch
python tests/bench/kv_cache.py FOLDER --peer peer/bin/python

kvpress 0.5.5 does not run beside transformers 5.23. Its CAKE does not exist; the other methods do.
After a press, a model of transformers takes the shortened cache for a shorter text, so the true
position ids are given here, and one token at a time where layers differ.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from kvpress import (
    AdaKVPress,
    ObservedAttentionPress,
    PyramidKVPress,
    RandomPress,
    SnapKVPress,
    StreamingLLMPress,
)
from transformers import AutoModelForCausalLM, DynamicCache

PRESSES = {
    "snapkv": lambda ratio, window: SnapKVPress(
        compression_ratio=ratio, window_size=window, kernel_size=5
    ),
    "pyramid": lambda ratio, window: PyramidKVPress(
        compression_ratio=ratio, window_size=window, kernel_size=5, beta=20
    ),
    "ada_snapkv": lambda ratio, window: AdaKVPress(
        SnapKVPress(compression_ratio=ratio, window_size=window, kernel_size=5), alpha_safeguard=0.2
    ),
    "h2o": lambda ratio, window: ObservedAttentionPress(compression_ratio=ratio),
    "recency": lambda ratio, window: StreamingLLMPress(compression_ratio=ratio, n_sink=4),
    "random": lambda ratio, window: RandomPress(compression_ratio=ratio, seed=0),
}


@torch.no_grad()
def nats(
    model: torch.nn.Module,
    press: object,
    context: torch.Tensor,
    continuation: torch.Tensor,
    step: int,
) -> np.ndarray:
    cache, length = DynamicCache(), context.shape[1]
    with press(model):
        logits = [model(context, past_key_values=cache).logits[:, -1:]]
    fed = continuation[:, :-1]
    for at in range(0, fed.shape[1], step):
        part = fed[:, at : at + step]
        place = torch.arange(length + at, length + at + part.shape[1])[None].expand(len(part), -1)
        logits.append(model(part, past_key_values=cache, position_ids=place).logits)
    scored = (
        torch.cat(logits, 1).float().log_softmax(-1).gather(-1, continuation[..., None])[..., 0]
    )
    return -scored.double().mean(1).numpy()


def main(folder: str, data: str, out: str) -> None:
    torch.set_num_threads(1)
    given = np.load(data)
    contexts, continuations = (
        torch.from_numpy(given[name]) for name in ("contexts", "continuations")
    )
    sizes, window, batch = given["sizes"].tolist(), int(given["window"]), int(given["batch"])
    found: dict[str, object] = {}
    for name, make in PRESSES.items():
        attention = "eager" if name == "h2o" else "sdpa"
        model = AutoModelForCausalLM.from_pretrained(folder, attn_implementation=attention).eval()
        began, rows = time.perf_counter(), []
        for size in sizes:
            press = make(1 - size / contexts.shape[1], window)
            step = 1 if name == "pyramid" else continuations.shape[1]
            parts = [
                nats(model, press, contexts[at : at + batch], continuations[at : at + batch], step)
                for at in range(0, len(contexts), batch)
            ]
            rows.append(np.concatenate(parts).tolist())
        found[name] = rows
        print(f"kvpress {name}: {time.perf_counter() - began:.0f} s", flush=True)
    Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
