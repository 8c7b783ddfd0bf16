"""A fused kernel is believed only once it has shown that it computes what the blockwise engine
does.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from stabmon.operator import kernels
from stabmon.operator.fused import FusedAttention
from tests.support.operator_cases import CASES, assert_statistic, plain, truth


@pytest.fixture(autouse=True)
def _proofs_are_made_afresh() -> Iterator[None]:
    kernels.prove.cache_clear()
    yield
    kernels.prove.cache_clear()


def wrong_logsumexp(*args: object) -> tuple[Tensor, Tensor]:
    out, lse = kernels._cpu(*args)  # type: ignore[arg-type]
    return out, lse + 0.01


def wrong_output(*args: object) -> tuple[Tensor, Tensor]:
    out, lse = kernels._cpu(*args)  # type: ignore[arg-type]
    return out * 1.01, lse


def ignores_the_mask(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return kernels._cpu(q, k, v, None, causal, scale)


def ignores_causality(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, causal: bool, scale: float
) -> tuple[Tensor, Tensor]:
    return kernels._cpu(q, k, v, mask, False, scale)


def gives_nan(*args: object) -> tuple[Tensor, Tensor]:
    out, lse = kernels._cpu(*args)  # type: ignore[arg-type]
    return out, lse.masked_fill(lse == lse, torch.nan)


def is_missing(*args: object) -> tuple[Tensor, Tensor]:
    raise RuntimeError("no kernel for this\nand a long trace")


LIARS = [wrong_logsumexp, wrong_output, ignores_the_mask, ignores_causality, gives_nan, is_missing]


@pytest.mark.parametrize("liar", LIARS)
def test_a_kernel_that_lies_is_refused_with_one_warning_and_results_are_right(
    liar: kernels.Run, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(kernels._CANDIDATES, "cpu", (("liar", liar),))
    with caplog.at_level(logging.WARNING, "stabmon"):
        for _ in range(3):
            operator = CASES["causal"].operator("fused")
            for name, wanted in truth(CASES["causal"]).statistics().items():
                assert_statistic(name, operator._get(name), wanted, 4.0)
    assert len(caplog.records) == 1
    assert "liar" in caplog.text
    assert "the blockwise engine is used" in caplog.text


def test_a_proof_without_memory_is_made_anew(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    calls = []

    def out_of_memory_once(*args: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("CUDA out of memory")
        return kernels._cpu(*args)  # type: ignore[arg-type]

    monkeypatch.setitem(kernels._CANDIDATES, "cpu", (("once", out_of_memory_once),))
    assert kernels.proven_kernel(torch.device("cpu"), 16) is None
    assert kernels.proven_kernel(torch.device("cpu"), 16) is not None
    assert caplog.records == []


def test_nothing_is_proven_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as capture:
        capture.setattr(kernels, "is_capturing", lambda: True)
        assert kernels.proven_kernel(torch.device("cpu"), 16) is None
    assert kernels.proven_kernel(torch.device("cpu"), 16) is not None


def test_the_next_candidate_is_tried(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    honest = kernels._CANDIDATES["cpu"]
    monkeypatch.setitem(kernels._CANDIDATES, "cpu", (("liar", wrong_output), *honest))
    kernel = kernels.proven_kernel(torch.device("cpu"), 16)
    assert kernel is not None
    assert kernel.name == honest[0][0]
    assert caplog.records == []


@pytest.mark.parametrize("head_dim", [1, 7, 64, 128])
def test_the_cpu_kernel_proves_itself(head_dim: int) -> None:
    kernel = kernels.proven_kernel(torch.device("cpu"), head_dim)
    assert kernel is not None


def test_the_kernel_is_really_asked_where_scores_are_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []

    def counting(*args: object) -> tuple[Tensor, Tensor]:
        calls.append(1)
        return kernels._cpu(*args)  # type: ignore[arg-type]

    monkeypatch.setitem(kernels._CANDIDATES, "cpu", (("counting", counting),))
    kernels.proven_kernel(torch.device("cpu"), 16)
    calls.clear()
    plain(is_causal=True).operator("fused").prepare(["entropy", "log_partition", "mean_score"])
    assert len(calls) == 1
    calls.clear()
    plain(is_causal=True, softcap=2.0).operator("fused").prepare(["entropy"])
    assert calls == []


def test_only_plain_scores_go_to_the_kernel() -> None:
    plain_to_the_kernel = {
        "causal": True,
        "bool mask": True,
        "additive -inf": True,
        "additive -10000": True,
        "key padding left": True,
        "softcap": False,
        "learned sinks": False,
        "pairwise bias": False,
    }
    for name, wanted in plain_to_the_kernel.items():
        operator = CASES[name].operator("fused")
        assert isinstance(operator, FusedAttention)
        assert operator.is_exact is wanted, name
