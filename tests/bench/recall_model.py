"""Train a small Llama that looks things up in its context: a model on which it shows what a cache has lost.

    python tests/bench/recall_model.py FOLDER [--minutes 15] [--threads 1]

Rows are random bytes or library text in which passages come again later: whoever attends to the earlier copy knows what follows.
Short rows first, random bytes twice, in which such heads form within minutes, then longer ones of both kinds, up to 2048 bytes. Prints
the held-out loss on passages that came before, at several distances, beside the same passages without their earlier copy.
"""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent))
from long_model import CONTEXT, texts

STAGES = ((64, 32, 0.15), (256, 8, 0.35), (CONTEXT, 1, 0.5))
"""Row length, batch, and share of the time."""
RATE = 3e-3


def make_model(seed: int = 0) -> torch.nn.Module:
    """Return the model before training: two layers, 4 query and 2 key heads of 32."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=256,
            hidden_size=128,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=2 * CONTEXT,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
            bos_token_id=None,
            eos_token_id=None,
            pad_token_id=None,
        )
    )


def rows_with_repeats(data: Tensor, length: int, batch: int, generator: torch.Generator) -> Tensor:
    """Return ``[batch, length]`` bytes: text and random bytes by turns, a half of each covered by copies of what came before.

    In the shortest rows, all random, the second half is the first once more.
    """
    if length == STAGES[0][0]:
        half = torch.randint(33, 97, (batch, length // 2), generator=generator)
        return torch.cat([half, half], 1)

    def draw(low: int, high: int) -> int:
        return int(torch.randint(low, high, (1,), generator=generator))

    rows = []
    for index in range(batch):
        if index % 2:
            row = data[(at := draw(0, len(data) - length)) : at + length].clone()
        else:
            row = torch.randint(33, 97, (length,), generator=generator)
        covered = 0
        while covered < length // 2:
            size = draw(12, 49)
            target = draw(size + 1, length - size)
            source = draw(0, target - size + 1)
            row[target : target + size] = row[source : source + size].clone()
            covered += size
        rows.append(row)
    return torch.stack(rows)


@torch.no_grad()
def recall(model: torch.nn.Module, data: Tensor, distance: int, rows: int = 8, size: int = 64) -> tuple[float, float]:
    """Return the loss on a passage that came ``distance`` bytes before, and on the same without that copy, in nats a byte."""
    model.eval()
    starts = [at * (len(data) - 3000) // rows for at in range(rows)]
    text = torch.stack([data[at : at + distance + 32] for at in starts])
    with_copy = torch.cat([text, text[:, : 32 + size]], 1)
    other = torch.stack([data[at + 1500 : at + 1500 + distance + 32] for at in starts])
    losses = []
    for row in (with_copy, torch.cat([other, text[:, : 32 + size]], 1)):
        logits = model(input_ids=row, use_cache=False).logits[:, -size - 1 : -1]
        losses.append(float(torch.nn.functional.cross_entropy(logits.flatten(0, 1), row[:, -size:].flatten())))
    model.train()
    return losses[0], losses[1]


def train(folder: Path, minutes: float, seed: int = 0) -> torch.nn.Module:
    """Train for some minutes of wall time, save at each stage's end, and return the model."""
    model, (data, held_out, _) = make_model(seed), texts()
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, betas=(0.9, 0.95), weight_decay=0.05)
    began, step, done = time.monotonic(), 0, 0.0
    for length, batch, share in STAGES:
        done += share
        while (spent := (time.monotonic() - began) / (60 * minutes)) < done:
            for group in optimizer.param_groups:
                group["lr"] = RATE * min(1.0, (step + 1) / 50) * max(0.1, 1 - spent)
            rows = rows_with_repeats(data, length, batch, generator)
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            step += 1
            if step % 100 == 0:
                with_copy, without = recall(model, held_out, 64)
                print(f"step {step} length {length} loss {loss.item():.3f}, 64 back {with_copy:.3f} / {without:.3f}", flush=True)
        model.save_pretrained(folder)
        for distance in (64, 256, 1024, 1536):
            print(
                f"  {distance} back: {recall(model, held_out, distance)[0]:.3f} / {recall(model, held_out, distance)[1]:.3f}",
                flush=True,
            )
    return model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--minutes", type=float, default=15)
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    train(args.folder, args.minutes)


if __name__ == "__main__":
    main()
