"""The text learned by small models, byte by byte.

The same for all runs of one Python version: by default the help topics of Python's own
documentation (``pydoc_data.topics``, about 0.45 MB of English and code), joined in the order of
their names; where a Python ships without them, the modules of its standard library. A file of the
user's takes their place.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

VOCABULARY = 256
"""Number of tokens, one per byte."""


class CorpusError(ValueError):
    """An unusable text; the message is one line and names the mend."""


@dataclass(frozen=True, eq=False)
class Corpus:
    """Blocks of bytes to train and to validate on. N and M blocks of S bytes."""

    source: str
    """Origin of the text."""
    sha256: str
    """Hash of the whole text, before it is cut."""
    train: Tensor
    """Training blocks, ``[N, S]`` int64."""
    validation: Tensor
    """Validation blocks, ``[M, S]`` int64; none of them is in ``train``."""

    def stream(self, steps: int, batch: int, seed: int) -> Tensor:
        """Return the training blocks of each step, ``[steps, batch]`` indices.

        Shuffled anew for every pass by an own generator. A step's batch depends on nothing but the
        arguments, so that paired runs see the same data and a resumed run continues exactly.

        Args:
            steps: optimizer steps.
            batch: blocks per step.
            seed: of the shuffles.
        """
        generator = torch.Generator().manual_seed(seed)
        passes = -(-steps * batch // len(self.train))
        order = torch.cat(
            [torch.randperm(len(self.train), generator=generator) for _ in range(passes)]
        )
        return order[: steps * batch].view(steps, batch)


def load_corpus(
    text: str | Path | None = None, *, block: int, validation_share: float = 0.1, seed: int = 0
) -> Corpus:
    """Read a text, cut it into blocks, shuffle them and split off a validation part.

    Args:
        text: a file in place of the default text, read as bytes.
        block: bytes per block; a shorter rest is dropped.
        validation_share: share of the blocks kept for validation, in (0, 1); at least one block.
        seed: of the shuffle alone; the global generators are not touched.

    Raises:
        CorpusError: if the file is missing or empty, or the text does not fill two blocks.
    """
    if not 0 < validation_share < 1:
        raise CorpusError(
            f"validation share {validation_share}: use a number between 0 and 1, such as 0.1"
        )
    source, raw = default_text() if text is None else read_text(text)
    count = len(raw) // block
    if count < 2:
        raise CorpusError(
            f"{source} holds {len(raw)} bytes, fewer than two blocks of {block}: use a longer "
            "text or a shorter block"
        )
    blocks = (
        torch.frombuffer(bytearray(raw[: count * block]), dtype=torch.uint8)
        .view(count, block)
        .long()
    )
    blocks = blocks[torch.randperm(count, generator=torch.Generator().manual_seed(seed))]
    held_out = min(max(1, round(count * validation_share)), count - 1)
    return Corpus(
        source,
        hashlib.sha256(raw).hexdigest(),
        train=blocks[held_out:],
        validation=blocks[:held_out],
    )


def read_text(path: str | Path) -> tuple[str, bytes]:
    """Read a file; return its name and bytes.

    Raises:
        CorpusError: if it cannot be read, or is empty.
    """
    try:
        raw = Path(path).read_bytes()
    except OSError as error:
        raise CorpusError(
            f"cannot read the text {path}: {error.strerror}; name a readable file, or none for "
            "the default text"
        ) from error
    if not raw:
        raise CorpusError(
            f"the text {path} is empty: name a file with at least two blocks of bytes"
        )
    return str(path), raw


def default_text() -> tuple[str, bytes]:
    """Return the origin and the bytes of the text shipped with every Python."""
    try:
        from pydoc_data.topics import topics
    except ImportError:
        return library_text()
    return "pydoc_data.topics", "\n\n".join(topics[name] for name in sorted(topics)).encode()


def library_text() -> tuple[str, bytes]:
    """Return origin and bytes of the standard library's modules."""
    library = Path(sysconfig.get_path("stdlib"))
    return f"the standard library in {library}", b"\n\n".join(
        path.read_bytes() for path in sorted(library.glob("*.py"))
    )
