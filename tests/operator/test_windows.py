"""Windows folded into the batch cost what their number asks for, no call each and nothing that
grows with their square.
"""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from stabmon.capture.masks.recover import recover_mask
from stabmon.capture.provenance.axes import Axes
from stabmon.capture.provenance.products import ScoreProvenance
from stabmon.operator.from_call import operator_of
from stabmon.records import AttentionCall
from stabmon.signals import SIGNALS
from stabmon.signals.reduce import measure

TOKENS, HEADS, DIM = 64, 2, 8


class Work(TorchDispatchMode):
    """Counts operations, and the elements that they write."""

    def __init__(self):
        super().__init__()
        self.operations = self.elements = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.operations += 1
        if not function.is_view:
            self.elements += sum(
                each.numel() for each in tree_leaves(result) if isinstance(each, torch.Tensor)
            )
        return result


def of_windows(windows, kind):
    """A call that a model makes with a mask or bias for each window, and the scores it forms."""
    generator = torch.Generator().manual_seed(windows)
    query, key = torch.randn(2, windows, HEADS, TOKENS, DIM, generator=generator).unbind()
    added = torch.randn(windows, 1, TOKENS, TOKENS, generator=generator)
    if kind == "mask":
        added = torch.where(added.clamp(max=1.0) > -1, 0.0, -torch.inf)
    scores = query @ key.mT + added
    call = AttentionCall("a", None, None, scale=1.0)
    axes = Axes(frozenset({2}), frozenset({3}))
    return call, scores, ScoreProvenance(query, key, torch.float32, axes, masked=True), query, key


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_windows_are_explained_together_and_rightly(kind):
    counts = []
    for windows in (16, 128):
        given = of_windows(windows, kind)
        with Work() as work:
            full = recover_mask(*given)
        counts.append(work.operations)
    assert counts[1] <= counts[0] + 8
    mask = full.mask if kind == "bias" else torch.where(full.mask, 0.0, -torch.inf)
    torch.testing.assert_close(full.query @ full.key.mT + mask, given[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", ["mask", "bias"])
def test_the_work_of_measuring_grows_with_the_windows_and_no_faster(kind):
    elements = []
    for windows in (128, 512):
        call = recover_mask(*of_windows(windows, kind))
        with Work() as work:
            measure(operator_of(call, "blockwise"), list(SIGNALS))
        elements.append(work.elements)
    assert elements[1] < 4.4 * elements[0]
