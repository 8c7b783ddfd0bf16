"""Measure ``stabmon watch``, and show its screens.

CPU of a look at 100 MB of records: the first one, one with a new reading, one without news, beside
reading all records. Captures at 80 x 24 of the same 32-layer run, healthy and with W_q and W_k
growing by 1% a step, as ``watch --once`` prints them.

    python tests/bench/watch.py [--megabytes 100] [--runs FOLDER] [--steps 300]
"""

from __future__ import annotations

import argparse
import re
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

if not __package__:
    import on_path  # noqa: F401

import numpy as np
import torch
from transformers import GPT2Config, GPT2LMHeadModel

import stabmon
from stabmon.records import LayerInfo, Reading
from stabmon.sinks.jsonl import JsonlSink

LAYERS, HEADS = 32, 16
GROWTH_FROM = 60
"""First step after which W_q and W_k of four layers grow."""


def small_gpt2() -> GPT2LMHeadModel:
    """Return a GPT-2 of 32 layers of 16 heads, width 64."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=64,
        n_layer=LAYERS,
        n_head=HEADS,
        n_positions=64,
        vocab_size=128,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        use_cache=False,
        loss_type="ForCausalLM",
    )
    return GPT2LMHeadModel(config).train()


def train(folder: Path, steps: int, growth: float) -> None:
    """Train on walks over 128 tokens; W_q and W_k of four layers times ``growth`` a step."""
    model = small_gpt2()
    optimizer = torch.optim.AdamW(model.parameters(), 2e-4)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 0.02, total_iters=40)
    generator = torch.Generator().manual_seed(1)
    with stabmon.AttentionStabilityMonitor(
        model, optimizer, config="observe", log_every=10, sinks=["jsonl"], run_dir=folder
    ) as monitor:
        for step in range(1, steps + 1):
            moves = torch.randint(-2, 3, (4, 48), generator=generator)
            start = torch.randint(0, 128, (4, 1), generator=generator)
            tokens = (start + moves.cumsum(1)) % 128
            loss = model(tokens, labels=tokens).loss
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            if growth != 1.0 and step > GROWTH_FROM:
                with torch.no_grad():
                    for layer in model.transformer.h[8:12]:
                        layer.attn.c_attn.weight[:, :128].mul_(growth)
            monitor.on_step(loss=loss)


if __name__ == "__main__":
    import sys

    train(Path(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]))
