"""The corpus is the same for all runs; no block is both learnt and validated on."""

from __future__ import annotations

import hashlib
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch

from stabmon.tiny.corpus import CorpusError, load_corpus


def test_the_default_text_is_pythons_help_in_the_order_of_its_names() -> None:
    raw = "\n\n".join(topics[name] for name in sorted(topics)).encode()
    corpus = load_corpus(block=128)
    assert corpus.sha256 == hashlib.sha256(raw).hexdigest()
    assert corpus.source == "pydoc_data.topics"
    pieces = [raw[i : i + 128] for i in range(0, len(raw) - 127, 128)]
    found = [bytes(block.tolist()) for block in torch.cat((corpus.train, corpus.validation))]
    assert sorted(found) == sorted(pieces)
    assert len(corpus.validation) == round(len(pieces) * 0.1)


def test_training_and_validation_share_no_block(tmp_path: Path) -> None:
    path = tmp_path / "numbered.txt"
    path.write_bytes(b"".join(b"%08d" % i for i in range(500)))
    corpus = load_corpus(path, block=8)
    train, validation = (
        {bytes(block.tolist()) for block in part} for part in (corpus.train, corpus.validation)
    )
    assert (len(train), len(validation)) == (450, 50)
    assert not train & validation


def test_the_split_depends_on_its_seed_and_not_on_the_global_generator() -> None:
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = load_corpus(block=128)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(load_corpus(block=128).train, first.train)
    assert not torch.equal(load_corpus(block=128, seed=1).train, first.train)


def test_a_stream_passes_over_every_block_before_it_repeats_one(text: Path) -> None:
    corpus = load_corpus(text, block=32)
    stream = corpus.stream(steps=30, batch=4, seed=3)
    assert stream.shape == (30, 4)
    size = len(corpus.train)
    assert sorted(stream.flatten()[:size].tolist()) == list(range(size))
    assert torch.equal(corpus.stream(10, 4, seed=3), stream[:10])
    assert not torch.equal(corpus.stream(30, 4, seed=4), stream)


def test_without_the_help_topics_the_standard_library_is_read(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pydoc_data.topics", None)
    corpus = load_corpus(block=128)
    assert corpus.source.startswith("the standard library in ")
    assert len(corpus.train) > 1000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is empty"),
        (b"x" * 63, "holds 63 bytes, fewer than two blocks of 32"),
        (None, "cannot read the text"),
    ],
)
def test_a_useless_text_is_refused_with_its_mend(
    tmp_path: Path, content: bytes | None, message: str
) -> None:
    path = tmp_path / "text.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CorpusError, match=message):
        load_corpus(path, block=32)


def test_a_share_outside_0_to_1_is_refused() -> None:
    with pytest.raises(CorpusError, match="validation share 1"):
        load_corpus(block=128, validation_share=1)
