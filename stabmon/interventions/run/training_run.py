"""Give interventions access to the parts of a training run."""

from __future__ import annotations

import functools
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from stabmon._torch.forward_call import ForwardCall
from stabmon._torch.optimizer_adapter import (
    ParameterGroup,
    innermost,
    parameter_groups,
    takes_hooks,
)
from stabmon._torch.process_group import world_size
from stabmon._torch.ranks.exchange import RankExchange
from stabmon._torch.ranks.share import RankShare
from stabmon.capture.names import clean_name
from stabmon.interventions.run.learning_rates import LearningRates
from stabmon.interventions.run.prepared import Prepared
from stabmon.interventions.run.step_hooks import StepHooks
from stabmon.interventions.run.weight_decays import WeightDecays
from stabmon.projections.not_applicable import NotApplicable
from stabmon.records import NonFinite
from stabmon.rules.tracking.history import History

logger = logging.getLogger("stabmon")


P = TypeVar("P", bound=Prepared)


@dataclass(eq=False)
class TrainingRun:
    """The parts of a training run that interventions may change or read.

    The monitor keeps ``step``, ``layers``, ``history`` and ``forwards`` up to date.

    Example:
        >>> model = nn.Linear(2, 1)
        >>> run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
        >>> [group.rate for group in run.groups], run.rate_factor
        ([0.1], 1.0)
    """

    model: nn.Module
    optimizer: Any = None
    """A torch optimizer, a wrapper around one, something that holds several, or a list of these."""
    lr_scheduler: Any = None
    """The scheduler of its rates; a list where there are several."""
    grad_scaler: Any = None
    step: int = 0
    """Optimizer steps made."""
    layers: Mapping[str, nn.Module] = field(default_factory=dict)
    """The attention module behind each layer name of the readings."""
    history: History = field(default_factory=History)
    forwards: Sequence[ForwardCall] = ()
    """The newest step's outermost forwards that can be replayed."""
    run_dir: Path | None = None
    accumulation: int = 1
    """Micro-batches of a step; the loss is divided by their number before each backward."""
    audit: Callable[[Mapping[str, Any]], None] = lambda record: None
    """Receives each audit record."""
    applied: list[Any] = field(default_factory=list)
    """Everything applied so far, in order: :class:`~stabmon.interventions.base.applied.Applied`."""
    step_hooks: StepHooks = field(default_factory=StepHooks)
    prepared: list[Prepared] = field(default_factory=list)
    """State that interventions keep from before the first step on."""
    by_user: bool = False
    """True while a person applies an intervention.

    One that has nothing to do yet is then held, and not refused.
    """
    stop_reason: str | None = None
    """The reason to stop training now; None to go on."""
    is_uncertain: bool = False
    """True if the newest steps may yet prove too long; no state then counts as healthy."""
    shorten_step: Callable[[Mapping[str, float]], Callable[[], None] | None] | None = None
    """Shortens the step just made, by a factor for each parameter group; None where impossible.

    It returns a function that undoes it, or None where the step was not probed.
    """
    hold_back: Callable[[Mapping[str, float]], Mapping[str, float]] | None = None
    """Holds groups at rates from the step in progress on, until the guard has judged it.

    It returns the share of its rate that each group is held back to; None where nothing may.
    """
    hold_back_decay: Callable[[Mapping[str, float]], None] | None = None
    """Holds groups at weight decays in the same way."""
    before_edit: list[Callable[[], None]] = field(default_factory=list)
    """Functions called before held interventions edit weights after an optimizer's step."""
    exchange: RankExchange | None = None
    """With the other ranks of a run on several; None where this one acts alone."""
    on_intervention_end: list[Callable[[], None]] = field(default_factory=list)
    """Functions called after an intervention was undone or released."""
    on_rollback: list[Callable[[int], None]] = field(default_factory=list)
    """Functions called after a rollback, with the step whose state the run was set to."""

    def find_prepared(self, kind: type[P]) -> P | None:
        """Return the prepared state of a kind.

        Args:
            kind: its class, derived from :class:`Prepared`.

        Returns:
            The state; None where no intervention asked for it.

        Example:
            >>> run = TrainingRun(None, prepared=[Prepared()])
            >>> run.find_prepared(Prepared) is run.prepared[0]
            True
        """
        return next((each for each in self.prepared if isinstance(each, kind)), None)

    @property
    def optimizers(self) -> list[Any]:
        """Every optimizer that was given, without wrappers around it."""
        return innermost(self.optimizer)

    @property
    def groups(self) -> list[ParameterGroup]:
        """Every parameter group of every optimizer."""
        return parameter_groups(self.optimizers)

    @property
    def schedulers(self) -> list[Any]:
        """Every scheduler whose state can be stored."""
        given = (
            self.lr_scheduler
            if isinstance(self.lr_scheduler, list | tuple)
            else [self.lr_scheduler]
        )
        return [each for each in given if hasattr(each, "state_dict")]

    @functools.cached_property
    def rates(self) -> LearningRates:
        """The factors and ceilings that held interventions put on the learning rates.

        Raises:
            NotApplicable: if there is no torch optimizer to be found.
        """
        _ = self.torch_optimizers
        return LearningRates(
            self.optimizers, functools.partial(self.step_hooks.add, "before_optimizer_step")
        )

    @functools.cached_property
    def decays(self) -> WeightDecays:
        """The ceilings that held interventions put on the weight decays."""
        return WeightDecays(self.optimizers)

    @property
    def rate_factor(self) -> float:
        """Smallest share of its scheduled rate that a group uses at the next step."""
        return self.rates.factor if "rates" in vars(self) else 1.0

    @property
    def rate_factors(self) -> dict[str, float]:
        """Share of its scheduled rate that each group used last; 1 is left out."""
        return self.rates.in_use if "rates" in vars(self) else {}

    def scheduled_rate(self, group: ParameterGroup) -> float | None:
        """Return the learning rate of a group as its scheduler has set it.

        Args:
            group: one of :attr:`groups`.

        Returns:
            The rate, without factors and ceilings of interventions; None where it has none.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> release = run.rates.hold(lambda: 0.5)
            >>> run.scheduled_rate(run.groups[0]), run.rate_factor
            (0.1, 0.5)
        """
        return self.rates.scheduled(group) if "rates" in vars(self) else group.rate

    def intended_rate(self, group: ParameterGroup) -> float | None:
        """Return the rate that a group is to use, were it not held back in this step.

        Args:
            group: one of :attr:`groups`.

        Returns:
            The scheduled rate, with factors and ceilings of interventions; None where it has none.

        Example:
            >>> model = nn.Linear(2, 1)
            >>> run = TrainingRun(model, torch.optim.SGD(model.parameters(), lr=0.1))
            >>> release = run.rates.hold(lambda: 0.5)
            >>> run.intended_rate(run.groups[0])
            0.05
        """
        rate = self.scheduled_rate(group)
        if rate is None or "rates" not in vars(self):
            return rate
        return rate * self.rates.share(group)

    def end_hold_back(self) -> None:
        """Hold nothing back any more, and remove what that needs from the optimizers."""
        # cleared last: after an error the next call tries again
        if self.hold_back is not None:
            self.rates.ignore_jumps()
            self.hold_back = None
        if self.hold_back_decay is not None:
            self.decays.ignore_jumps()
            self.hold_back_decay = None

    @property
    def torch_optimizers(self) -> list[torch.optim.Optimizer]:
        """The optimizers that take hooks around their steps.

        Raises:
            NotApplicable: if there is none.
        """
        found = [each for each in self.optimizers if takes_hooks(each)]
        if not found:
            kind = (
                "no optimizer"
                if self.optimizer is None
                else f"a {type(self.optimizer).__name__} without step hooks"
            )
            raise NotApplicable(
                f"the run has {kind}",
                "give the torch optimizer to the monitor: optimizer=optimizer",
            )
        return found

    @property
    def torch_optimizer(self) -> torch.optim.Optimizer:
        """The first of :attr:`torch_optimizers`.

        Raises:
            NotApplicable: if there is none.
        """
        return self.torch_optimizers[0]

    def note_edit(self) -> None:
        """Report that weights are about to be edited, so that the step itself is measured first.

        Example:
            >>> run = TrainingRun(None)
            >>> run.before_edit.append(lambda: print("measured"))
            >>> run.note_edit()
            measured
        """
        for notify in self.before_edit:
            notify()

    def newest_harmless_nonfinite(self) -> NonFinite | None:
        """Return the newest NaN or inf, if it has not reached the weights.

        Returns:
            The newest episode of the readings; None where it reached the weights, or there is none.

        Example:
            >>> TrainingRun(None).newest_harmless_nonfinite() is None
            True
        """
        known = (reading.non_finite for reading in reversed(self.history.readings))
        found = next((each for each in known if each is not None), None)
        return found if found is not None and found.touched in ("nothing", "gradients") else None

    def edited_layers(self) -> set[str]:
        """Return the layers here that held interventions may edit at every step, by own names.

        Example:
            >>> TrainingRun(None).edited_layers()
            set()
        """
        return {
            own
            for each in self.applied
            if each.active
            for layer, _ in each.effect.places
            if layer is not None and (own := self.share.own(layer)) is not None
        }

    def known_layers(self) -> list[str]:
        """Return the names of all attention layers seen so far, also before a resume.

        Returns:
            Qualified module names, those of the readings first.

        Example:
            >>> TrainingRun(None, layers={"h.0.attn": nn.Identity()}).known_layers()
            ['h.0.attn']
        """
        return list(dict.fromkeys([*self.history.layers, *self.layers]))

    def module(self, layer: str) -> nn.Module:
        """Return the attention module of a layer.

        Args:
            layer: the layer's name, as in readings and issues.

        Returns:
            The module.

        Raises:
            NotApplicable: if the model has no such module.

        Example:
            >>> TrainingRun(nn.Sequential(nn.Identity())).module("0")
            Identity()
        """
        if layer in self.layers:
            return self.layers[layer]
        name = layer.partition("#")[0]  # later calls of one module carry a number
        own_name = self.share.own(name)
        if own_name is None:
            raise NotApplicable(f"{name} is on another rank, which holds that part of the model")
        name = own_name
        for own, each in self.model.named_modules():
            if (clean_name(own) or type(each).__name__) == name:
                found: nn.Module = each
                return found
        raise NotApplicable(f"no attention module is known under {layer!r}")

    def max_logit(self, layer: str, head: int | None = None) -> float:
        """Return a head's largest score at the newest reading; NaN where unknown.

        Args:
            layer: the layer's name.
            head: the query head; None for the largest of all heads.

        Returns:
            The score ``max_logit``, dimensionless.

        Example:
            >>> TrainingRun(None).max_logit("h.0.attn")
            nan
        """
        if not len(self.history) or layer not in self.history.layers:
            return float("nan")
        values = self.history.now("max_logit")[self.history.of_layer(layer)]
        return float(values[head]) if head is not None else float(values.max(initial=float("-inf")))

    @property
    def loss_scale(self) -> float:
        """Factor on the loss before each backward: scaler's scale by micro-batches."""
        scaler = self.grad_scaler
        scale = float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else 1.0
        return scale / self.accumulation

    @property
    def share(self) -> RankShare:
        """The layers and heads of the whole run that this rank holds."""
        return RankShare() if self.exchange is None else self.exchange.share

    @property
    def ranks(self) -> int:
        """Number of processes that intervene together; 1 for one that acts alone."""
        return world_size() if self.exchange is not None and self.exchange.together else 1

    def largest_over_ranks(self, values: Tensor) -> Tensor:
        """Return the elementwise maximum over all ranks, which must all call this.

        NaN counts as infinite.

        Args:
            values: a float tensor of any shape, the same on all ranks.

        Returns:
            The maximum, of the same shape.

        Raises:
            RankFailed: where another rank has failed or come to other work; on all ranks alike.

        Example:
            >>> TrainingRun(None).largest_over_ranks(torch.tensor([1.0, float("nan")]))
            tensor([1., inf])
        """
        values = values.nan_to_num(nan=float("inf"), posinf=float("inf"), neginf=float("-inf"))
        if self.ranks > 1 and self.exchange is not None:
            given = values.double().reshape(-1).tolist()
            found = torch.tensor(self.exchange.meet("largest", given), dtype=torch.float64)
            values = found.reshape(values.shape).to(values)
        return values

    def any_rank(self, flag: bool) -> bool:
        """Return whether a flag is True on any rank; all ranks must call this.

        Args:
            flag: this rank's value.

        Returns:
            The same value on all ranks.

        Example:
            >>> TrainingRun(None).any_rank(False)
            False
        """
        if self.ranks == 1 or self.exchange is None:
            return flag
        return self.exchange.meet("any", [float(flag)])[0] > 0
