"""Pictures of trained controllers."""

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
    """Draw ``grid.png`` and ``series.png`` of the recorded controllers.

    Where they cannot be drawn the records remain, and a warning is logged.

    Args:
        watch: the records.
        folder: folder of the pictures.
    """
    try:
        watch.plot_grid("controller_kl", folder / "grid.png")
        watch.plot_series(folder / "series.png")
    except (ImportError, ValueError) as error:
        logger.warning("no pictures in %s: %s", folder, error)


def draw_generation(
    shape: Shape, corpus: CorpusSettings, folder: Path, name: str, seed: int
) -> None:
    """Continue a held-out text with trained controllers and draw them per byte.

    The pictures lie in ``generate/``.

    Args:
        shape: of the base.
        corpus: as in the base's training.
        folder: the study's.
        name: of the task with the controllers.
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
