"""Scores are multiplied in float32 under every precision that the user has chosen for the model."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from stabmon._torch.precision import full_float32
from stabmon.operator import STATISTICS, attention_operator
from stabmon.operator.blockwise import BlockwiseAttention
from stabmon.signals import SIGNALS, measure

SETTINGS = ("highest", "high", "medium")
DEVICES = (torch.device("cpu"), torch.device("cuda"))


def precisions() -> tuple[str, ...]:
    backends = torch.backends
    parts = (backends.cuda.matmul, backends.mkldnn.matmul)
    return (torch.get_float32_matmul_precision(), *(each.fp32_precision for each in parts))


@pytest.fixture(autouse=True)
def _setting_is_put_back() -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    yield
    torch.set_float32_matmul_precision(before)


@pytest.mark.skipif(
    not hasattr(torch.backends.cuda.matmul, "fp32_precision"), reason="before torch 2.9"
)
@pytest.mark.parametrize("device", DEVICES, ids=str)
@pytest.mark.parametrize("setting", SETTINGS)
def test_products_are_in_full_inside_and_the_setting_is_as_it_was_after(
    setting: str, device: torch.device
) -> None:
    torch.set_float32_matmul_precision(setting)
    before = precisions()
    with full_float32(device), full_float32(device):
        backend = torch.backends.cuda if device.type == "cuda" else torch.backends.mkldnn
        assert backend.matmul.fp32_precision in ("none", "ieee")
    assert precisions() == before


@pytest.mark.parametrize("setting", SETTINGS)
def test_all_products_of_an_operator_and_its_signals_are_in_full(setting: str) -> None:
    seen = []

    class Noted(BlockwiseAttention):
        def _note(self) -> None:
            matmul = torch.backends.mkldnn.matmul
            chosen = getattr(matmul, "fp32_precision", torch.get_float32_matmul_precision())
            seen.append(chosen in ("none", "ieee", "highest"))

        def _compute(self, statistics: set[str]) -> dict[str, torch.Tensor]:
            self._note()
            return super()._compute(statistics)

        def _matvec(self, x: torch.Tensor) -> torch.Tensor:
            self._note()
            return super()._matvec(x)

        @property
        def key_gram(self) -> torch.Tensor:  # type: ignore[override]
            self._note()
            return torch.eye(8).expand(1, 2, 8, 8)

    torch.set_float32_matmul_precision(setting)
    plain = attention_operator(torch.ones(1, 2, 4, 8), torch.ones(1, 2, 4, 8), scale=1.0)
    noted = Noted(plain.query, plain.key, 1.0, plain.visibility, None, None)
    noted.prepare(STATISTICS)
    noted.matvec(torch.ones(1, 2, 4, 3))
    measure(noted, list(SIGNALS))
    assert len(seen) >= 4
    assert all(seen)
