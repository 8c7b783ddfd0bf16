"""Train a small Llama on bytes until it attends over thousands of them.

python tests/bench/long_model.py FOLDER [--minutes 90] [--threads 1] [--start FOLDER]

The model for comparing caches. Grouped heads (4 query, 2 key, four layers), rotary positions, 2048
bytes of context. The text is the standard library's own source: much of it repeats over long
distances. Short sequences first, then longer ones. Prints the held-out loss by position: where it
goes on falling with the position the model makes use of its context.

Two runs after each other (40 minutes, then 50 with --start, on one shared core) end at 1.48 nats in
the first eighth of the context and 1.42 in the last. Such a model looks at its last few hundred
bytes: a passage that comes a second time is predicted no better.
"""

from __future__ import annotations

import argparse
import hashlib
import time
from pathlib import Path

import torch
from torch import Tensor

from stabmon.tiny.corpus import library_text

CONTEXT = 2048
STAGES = ((256, 16, 0.5), (1024, 4, 0.2), (CONTEXT, 2, 0.3))
"""Sequence length, batch, and share of the time."""


def make_model(seed: int = 0) -> torch.nn.Module:
    """Return the model before training."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=4 * CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def texts() -> tuple[Tensor, Tensor, str]:
    """Return training bytes, held-out bytes (other files) and the hash of both."""
    raw = library_text()[1]
    data = torch.frombuffer(bytearray(raw), dtype=torch.uint8).long()
    held_out = 40 * (CONTEXT + 1024)
    return data[:-held_out], data[-held_out:], hashlib.sha256(raw).hexdigest()


@torch.no_grad()
def loss_by_position(model: torch.nn.Module, data: Tensor, rows: int = 8) -> Tensor:
    """Return the mean held-out loss in nats of each eighth of the context, ``[8]``."""
    model.eval()
    blocks = data[: rows * CONTEXT].view(rows, CONTEXT)
    losses = []
    for block in blocks.split(2):
        logits = model(input_ids=block, use_cache=False).logits
        losses.append(
            torch.nn.functional.cross_entropy(
                logits[:, :-1].flatten(0, 1), block[:, 1:].flatten(), reduction="none"
            )
        )
    model.train()
    return torch.cat(losses).view(rows, -1)[:, : CONTEXT - 8].unflatten(1, (8, -1)).mean((0, 2))


def train(
    folder: Path, minutes: float, seed: int = 0, start: Path | None = None
) -> torch.nn.Module:
    """Train for some minutes; save into ``folder`` at each stage's end.

    Returns the model. With ``start`` the weights in that folder are trained on, with other batches.
    """
    from transformers import AutoModelForCausalLM

    seed += start is not None
    model, (data, held_out, digest) = make_model(seed), texts()
    if start is not None:
        model = AutoModelForCausalLM.from_pretrained(start)
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3, betas=(0.9, 0.95), weight_decay=0.1)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, {len(data):,} bytes, sha256 "
        f"{digest[:16]}",
        flush=True,
    )
    began, step, done = time.monotonic(), 0, 0.0
    for length, batch, share in STAGES:
        done += share
        while (spent := (time.monotonic() - began) / (60 * minutes)) < done:
            rate = 2e-3 * min(1.0, (step + 1) / 100) * max(0.05, 1 - spent)
            for group in optimizer.param_groups:
                group["lr"] = rate
            starts = torch.randint(len(data) - length, (batch,), generator=generator)
            rows = torch.stack([data[at : at + length] for at in starts.tolist()])
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 100 == 0:
                print(
                    f"step {step} length {length} loss {loss.item():.3f} "
                    f"{60 * minutes * spent:.0f} s",
                    flush=True,
                )
        model.save_pretrained(folder)
        print(
            "held-out loss by position "
            f"{[round(x, 3) for x in loss_by_position(model, held_out).tolist()]}",
            flush=True,
        )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=90)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--start", type=Path, help="a folder whose weights are trained on")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.folder, args.minutes, start=args.start)


if __name__ == "__main__":
    main()
