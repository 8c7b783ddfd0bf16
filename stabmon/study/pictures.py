"""Pictures of trained controllers at work."""

from __future__ import annotations

import dataclasses
import logging
from pathlib import Path

import torch

from stabmon.controllers import ControllerWatch, load_controllers
from stabmon.study.settings import CorpusSettings
from stabmon.tiny.corpus import load_corpus
from stabmon.tiny.language_models import Shape, make_model

logger = logging.getLogger("stabmon")


def draw(watch: ControllerWatch, folder: Path) -> None:
    """``grid.png`` and ``series.png`` of what was watched; where they cannot be drawn the records
    are there all the same.
    """
    try:
        watch.plot_grid("controller_kl", folder / "grid.png")
        watch.plot_series(folder / "series.png")
    except (ImportError, ValueError) as error:
        logger.warning("no pictures in %s: %s", folder, error)


def draw_generation(
    shape: Shape, corpus: CorpusSettings, folder: Path, name: str, seed: int
) -> None:
    """Let a base with trained controllers go on with a held-out text, and draw what they do at each
    byte, into ``generate/``.

    Args:
        shape: of the base.
        corpus: as it was trained on.
        folder: the study's.
        name: of the task whose controllers are meant.
        seed: of its base.
    """
    model = make_model(shape, corpus.block)
    model.load_state_dict(torch.load(folder / "weights" / f"base-{seed}.pt", weights_only=True))
    load_controllers(model, folder / "controllers" / name)
    prompt = load_corpus(**dataclasses.asdict(corpus)).validation[-1:, : corpus.block // 4]
    into = folder / "generate"
    with ControllerWatch(model.eval(), run_dir=into) as watch, torch.no_grad():
        options = {
            "max_new_tokens": corpus.block - prompt.shape[1],
            "do_sample": False,
            "use_cache": True,
            "eos_token_id": None,
        }
        written = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), **options
        )
    (into / "text.txt").write_bytes(bytes(written[0].tolist()))
    draw(watch, into)
