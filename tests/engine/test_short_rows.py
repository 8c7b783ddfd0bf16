"""Short sequences and narrow windows have an entropy, or are named once where they have none."""

import json
import logging

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import stabmon


class Windowed(nn.Module):
    """Two layers of causal attention, the second of which sees a window."""

    def __init__(self, window: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(Layer(8, each) for each in (10**6, window))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return x


class Layer(nn.Module):
    def __init__(self, width: int, window: int) -> None:
        super().__init__()
        self.qkv, self.window = nn.Linear(width, 3 * width), window

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, -1)).transpose(1, 2) for t in self.qkv(x).chunk(3, -1))
        seen = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril().triu(1 - self.window)
        mixed = nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=seen)
        return mixed.transpose(1, 2).flatten(-2)


def trained(tmp_path, length: int, window: int, steps: int = 4):
    model = Windowed(window)
    optimizer = torch.optim.AdamW(model.parameters())
    with stabmon.AttentionStabilityMonitor(
        model, optimizer, config="observe", log_every=1, sinks=["jsonl"], run_dir=tmp_path
    ) as monitor:
        for _ in range(steps):
            loss = model(torch.randn(3, length, 8)).square().mean()
            loss.backward()
            optimizer.step()
            diagnosis = monitor.on_step(loss=loss)
    assert not monitor.errors
    meta = json.loads((tmp_path / "stabmon" / "meta.json").read_text())
    return diagnosis, meta.get("few_visible_keys")


def said(caplog) -> list[tuple[int, str]]:
    return [
        (each.levelno, each.getMessage())
        for each in caplog.records
        if "normalized_entropy" in each.getMessage()
    ]


def test_a_short_context_and_a_narrow_window_have_an_entropy_and_are_named_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "stabmon")
    diagnosis, few = trained(tmp_path, length=8, window=4)
    assert few == {"layers.0": 8, "layers.1": 4}
    for layer in few:
        entropy = diagnosis.stats[layer]["normalized_entropy"]
        assert ((entropy > 0.5) & (entropy <= 1)).all()
    ((level, text),) = said(caplog)
    assert level == logging.INFO
    assert "layers.0 (8 keys), layers.1 (4 keys)" in text


def test_rows_of_one_key_have_none_and_a_warning_says_so_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, "stabmon")
    diagnosis, few = trained(tmp_path, length=20, window=1)
    assert few == {"layers.1": 1}
    assert np.isfinite(diagnosis.stats["layers.0"]["normalized_entropy"]).all()
    assert np.isnan(diagnosis.stats["layers.1"]["normalized_entropy"]).all()
    assert said(caplog) == [
        (logging.WARNING, "stabmon measures no normalized_entropy of layers.1 (1 key a row)")
    ]


@pytest.mark.parametrize("length", [16, 24])
def test_long_rows_are_not_spoken_of(tmp_path, caplog, length):
    caplog.set_level(logging.INFO, "stabmon")
    _, few = trained(tmp_path, length=length, window=16)
    assert few is None
    assert said(caplog) == []
