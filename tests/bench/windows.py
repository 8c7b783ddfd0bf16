"""Time a watched forward of models with windows folded into the batch.

python tests/bench/windows.py [--windows 128 512 2048] [--repeats 5]

As a multiple of a plain one. One thread; plain and watched forwards take turns, and each figure is
a ratio of medians of processor time. A whole training step is about three forwards, so that a
sampled step costs a third of what is above 1.
"""

from __future__ import annotations

import argparse
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")

import torch
from transformers import SwinConfig, SwinModel, Swinv2Config, Swinv2Model

import stabmon

SIZES: dict[str, Any] = {
    "image_size": 256,
    "patch_size": 4,
    "embed_dim": 32,
    "depths": [2, 2],
    "num_heads": [2, 4],
    "window_size": 8,
}
MODELS = {
    "Swin, sdpa": lambda: SwinModel(SwinConfig(**SIZES, attn_implementation="sdpa")),
    "Swin, eager": lambda: SwinModel(SwinConfig(**SIZES, attn_implementation="eager")),
    "Swin v2, hand-written": lambda: Swinv2Model(Swinv2Config(**SIZES)),
}
WINDOWS_AN_IMAGE = 64


def seconds(run: Callable[[], object]) -> float:
    """Return the processor time of one call."""
    begun = time.process_time()
    run()
    return time.process_time() - begun


def ratio(make: Callable[[], torch.nn.Module], windows: int, repeats: int) -> tuple[float, float]:
    """Return the median seconds of a plain forward, and a watched one as its multiple."""
    torch.manual_seed(0)
    model = make().train()
    pixels = torch.randn(windows // WINDOWS_AN_IMAGE, 3, 256, 256)
    plain, watched = [], []
    model(pixels)
    for _ in range(repeats):
        plain.append(seconds(lambda: model(pixels)))
        with stabmon.AttentionAnalyzer(model):
            watched.append(seconds(lambda: model(pixels)))
    return statistics.median(plain), statistics.median(watched) / statistics.median(plain)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--windows", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print(f"{'model':<24}" + "".join(f"{f'{count} windows':>16}" for count in given.windows))
    for name, make in MODELS.items():
        found = [ratio(make, count, given.repeats) for count in given.windows]
        print(
            f"{name:<24}"
            + "".join(f"{f'x {times:.2f} ({plain:.2f} s)':>16}" for plain, times in found),
            flush=True,
        )


if __name__ == "__main__":
    main()
