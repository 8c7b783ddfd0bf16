"""A forward that leaves no trace, also in what modules hold."""

import random

import numpy as np
import torch
from torch import nn

from stabmon._torch.isolation import has_hooks_of_others, side_effect_free


class Holds(nn.Module):
    """Module that draws from generators of its own and keeps notes of each forward."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.torch, self.numpy, self.old, self.python = (
            torch.Generator().manual_seed(0),
            np.random.default_rng(0),
            np.random.RandomState(0),
            random.Random(0),
        )
        self.notes, self.table, self.names, self.count = [], {}, set(), 0

    def draw(self):
        return (
            torch.rand(2, generator=self.torch).tolist(),
            self.numpy.random(),
            self.old.rand(),
            self.python.random(),
        )

    def forward(self, x):
        self.notes.append(self.draw())
        self.table[len(self.table)] = self.names.add(str(self.count))
        self.count += 1
        return x * self.weight


def test_generators_and_containers_that_modules_hold_are_put_back():
    model, other = Holds(), Holds()
    for each in (model, other):
        each(torch.ones(3))
    with side_effect_free(model):
        model(torch.ones(3))
        model.notes.pop(0)
    assert (model.notes, model.table, model.names, model.count) == (
        other.notes,
        other.table,
        other.names,
        other.count,
    )
    assert model.draw() == other.draw()


def test_a_hook_of_a_user_is_distinguished_from_one_of_torch():
    model = nn.utils.spectral_norm(nn.Linear(2, 2))
    assert not has_hooks_of_others(model)
    handle = model.register_forward_hook(lambda *_: None)
    assert has_hooks_of_others(model)
    handle.remove()
    assert not has_hooks_of_others(model)
