"""Full-precision copies of a parameter, which the optimizer steps in its place.

The model's own parameters are overwritten from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from stabmon._torch.optimizer_adapter import ParameterGroup, state_of
from stabmon.projections.not_applicable import NotApplicable

IN_STATE = ("master_param", "master_params", "master_weight", "master", "fp32_param", "exp_master")
"""Names of a parameter's full-precision copy in an optimizer's state."""


class SteppedRun(Protocol):
    """Model under training, as an edit of its weights needs it."""

    @property
    def model(self) -> nn.Module:
        """Model in training."""
        ...

    @property
    def step(self) -> int:
        """Number of optimizer steps made."""
        ...

    @property
    def optimizers(self) -> Sequence[Any]:
        """Every optimizer, without its wrappers."""
        ...

    @property
    def groups(self) -> Sequence[ParameterGroup]:
        """Every parameter group of every optimizer."""
        ...


def copies_of(parameter: nn.Parameter, run: SteppedRun) -> list[Tensor]:
    """Return the parameter itself, then every master copy of it.

    An edit must reach them all, or the next step undoes it. A master is found in an optimizer's
    state for the parameter, or among the optimizers' own parameters: in the same order as the
    model's, or as the only one that rounds to the parameter bit for bit. Copies of an optimizer
    that was not given are not found.

    Args:
        parameter: a parameter of the model.
        run: the model with its optimizers.

    Raises:
        NotApplicable: if the optimizers step something else in which the parameter is not to be
            found (flattened or sharded copies).
    """
    states: list[dict[str, Any]] = [state_of(each).get(parameter, {}) for each in run.optimizers]
    masters = [
        state[name]
        for state in states
        for name in IN_STATE
        if isinstance(state.get(name), Tensor) and state[name].shape == parameter.shape
    ]
    stepped = [each for group in run.groups for each in group.parameters]
    if any(each is parameter for each in stepped):
        return [parameter, *masters]
    trained = [each for each in run.model.parameters() if each.requires_grad]
    own = {id(each) for each in trained}
    others = [each for each in stepped if id(each) not in own]
    if not others:  # no masters: an optimizer that was not given steps it as it is
        return [parameter, *masters]
    if [each.shape for each in others] == [each.shape for each in trained]:
        others = [other for other, each in zip(others, trained, strict=True) if each is parameter]
    with torch.no_grad():
        alike = [
            each
            for each in others
            if each.shape == parameter.shape and torch.equal(each.to(parameter.dtype), parameter)
        ]
    if len(alike) != 1:
        raise NotApplicable(
            "none of the optimizers that were given steps this parameter or a recognisable copy of "
            "it: masters are flattened or sharded, or an optimizer was not given",
            "use FSDP2's fully_shard, or torch's optimizers on the model's own parameters, and "
            "give all of them: optimizer=[one, other]",
        )
    return [parameter, alike[0]]
