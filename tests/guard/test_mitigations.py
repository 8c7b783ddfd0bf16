"""The mitigations that guard is measured beside train, act, and leave no hook."""

import copy

import pytest
import torch

from tests.bench.references.mitigations import MITIGATIONS
from tests.support.rank_faults import Tiny, left_behind


@pytest.mark.parametrize("name", MITIGATIONS)
def test_a_mitigation_changes_a_run_that_it_is_for_and_leaves_no_hook(name: str) -> None:
    model = Tiny()
    with torch.no_grad():
        model.attention.q.weight.mul_(200.0)
    plain = copy.deepcopy(model)
    for each, mitigation in ((plain, None), (model, MITIGATIONS[name])):
        optimizer = torch.optim.SGD(each.parameters(), 1e-2)
        manager = None if mitigation is None else mitigation(each, optimizer)
        if manager is not None:
            manager.__enter__()
        generator = torch.Generator().manual_seed(0)
        for step in range(30):
            x = torch.randn(4, 6, 32, generator=generator)
            loss = each(x).square().mean() * (1e4 if step == 29 else 1.0)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        if manager is not None:
            manager.__exit__(None, None, None)
        assert left_behind(each, optimizer) == []
    assert not torch.equal(plain.attention.q.weight, model.attention.q.weight)
    assert all(each.isfinite().all() for each in model.parameters())
