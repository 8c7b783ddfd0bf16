"""The base class of interventions, and their registry."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from stabmon._storage.stored_value import Stored
from stabmon.interventions.base.applied import Applied
from stabmon.interventions.base.declaration import Declaration, intervention_name
from stabmon.interventions.effects.effect import Effect
from stabmon.interventions.run.budget import Budget
from stabmon.interventions.run.prepared import Prepared
from stabmon.interventions.run.training_run import TrainingRun
from stabmon.records import StabilityIssue
from stabmon.registry import Registry


@dataclass(frozen=True)
class Intervention(Declaration, ABC):
    """A change to a training run that can be undone.

    Its dataclass fields are its settings. A subclass overrides :meth:`_start`, which changes the
    run and returns an :class:`~stabmon.interventions.effects.effect.Effect` that can take the
    change back. It declares in class attributes when the guard is to choose it; the guard knows no
    intervention by name. One of another package is found by its entry point in the group
    ``stabmon.interventions``.

    Raises:
        ValueError: for an invalid setting, naming it.

    Example:
        An intervention that zeroes the momentum of an optimizer, applied to a run and undone:

        >>> import torch
        >>> class MomentumZeroed(Effect):
        ...     def __init__(self, buffers):
        ...         super().__init__(resources=frozenset(["momentum"]))
        ...         self.saved = [(each, each.clone()) for each in buffers]
        ...         for each in buffers:
        ...             each.zero_()
        ...     def undo(self):
        ...         for each, value in self.saved:
        ...             each.copy_(value)
        ...         return True
        >>> @dataclass(frozen=True)
        ... class ZeroMomentum(Intervention):
        ...     treats = {"loss": 50}
        ...     once = True
        ...     def _start(self, run):
        ...         states = run.torch_optimizer.state.values()
        ...         return MomentumZeroed([each["momentum_buffer"] for each in states])
        >>> model = torch.nn.Linear(2, 1, bias=False)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        >>> model(torch.ones(1, 2)).sum().backward()
        >>> optimizer.step()
        >>> momentum = optimizer.state[model.weight]["momentum_buffer"]
        >>> applied = ZeroMomentum().apply(TrainingRun(model, optimizer, step=1))
        >>> momentum.tolist()
        [[0.0, 0.0]]
        >>> applied.undo(), momentum.tolist()
        (True, [[1.0, 1.0]])
    """

    def apply(self, run: TrainingRun, issue: StabilityIssue | None = None) -> Applied:
        """Change the run, and write the audit record.

        To be called after an optimizer step and before the next forward.

        Args:
            run: the run.
            issue: the issue that it is to repair, instead of ``self.issues``.

        Returns:
            A record of it, whose ``undo()`` takes it back.

        Raises:
            NotApplicable: if it does not fit; then nothing was changed.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> run = TrainingRun(torch.nn.Linear(2, 1))
            >>> applied = Stop(why="asked for").apply(run)
            >>> run.stop_reason, applied.record["after"]
            ('asked for', {'stop': 'asked for'})
        """
        intervention = self if issue is None else self.aimed_at([issue])
        effect = intervention._start(run)
        return Applied(intervention, run, effect, step=run.step).write_audit("applied")

    def unsuited(self, run: TrainingRun, symptom: str) -> str:
        """Return the reason for which it cannot help against a symptom now.

        The guard then skips it, and reports the reason where no other intervention is left.

        Args:
            run: the run.
            symptom: the symptom's name.

        Returns:
            The reason; empty where it may help.

        Example:
            >>> from stabmon.interventions.stop import Stop
            >>> Stop().unsuited(TrainingRun(None), "non_finite")
            ''
        """
        return ""

    def needless(self, run: TrainingRun) -> str:
        """Return the reason for which guard leaves it out at the places of its issues now.

        A person may apply it all the same.

        Args:
            run: the run.

        Returns:
            The reason; empty where it may help.

        Example:
            >>> from stabmon.interventions.stop import Stop
            >>> Stop().needless(TrainingRun(None))
            ''
        """
        return ""

    def affordable(self, run: TrainingRun, budget: Budget, uses: int) -> bool:
        """Return whether the budget allows one more use of it.

        The limits on all interventions together are checked elsewhere.

        Args:
            run: the run.
            budget: the limits.
            uses: number of times it was applied so far.

        Returns:
            True if it may be applied.

        Example:
            >>> from stabmon.interventions.rollback import Rollback
            >>> budget = Budget(max_rollbacks=1)
            >>> [Rollback().affordable(TrainingRun(None), budget, uses) for uses in (0, 1)]
            [True, False]
        """
        return True

    def is_due(self, issue: StabilityIssue, tried: Sequence[Applied]) -> bool:
        """Return whether it is next for an alarm at once, whatever the order of treatment.

        Args:
            issue: an open alarm.
            tried: interventions applied for it since its cause was found, see :attr:`after`.

        Returns:
            True to apply it next.

        Example:
            >>> from stabmon.interventions.rollback import Rollback
            >>> issue = StabilityIssue(7, None, None, "loss_spike", "error", 9.0, 3.0, "")
            >>> Rollback().is_due(issue, [])
            False
        """
        return False

    def prepare(self, run: TrainingRun) -> Prepared | None:
        """Return the state that it needs from before the first step on.

        The guard makes it when the run is set up, calls its ``begin()`` before the first step and
        ``offer()`` after each sampled one, and stores it. :meth:`_start` finds it by
        :meth:`~stabmon.interventions.run.training_run.TrainingRun.find_prepared`.

        Args:
            run: the run.

        Returns:
            The state; None where it needs none.

        Example:
            >>> import torch
            >>> from stabmon.interventions.rollback import Rollback
            >>> type(Rollback().prepare(TrainingRun(torch.nn.Linear(2, 1)))).__name__
            'HealthyStates'
        """
        return None

    def resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Applied:
        """Apply it again after a restart.

        Args:
            run: the run.
            state: a value of :meth:`Applied.state_dict`.

        Returns:
            Its record, in force again.

        Raises:
            NotApplicable: if it no longer fits.

        Example:
            >>> import torch
            >>> from stabmon.interventions.extend_warmup import ExtendWarmup
            >>> model = torch.nn.Linear(2, 1)
            >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
            >>> warmup = ExtendWarmup(steps=10, start=0.5)
            >>> state = warmup.apply(TrainingRun(model, optimizer)).state_dict()
            >>> resumed = TrainingRun(model, optimizer, step=5)
            >>> applied = warmup.resume(resumed, state)
            >>> resumed.rate_factor
            0.75
        """
        return Applied(
            self,
            run,
            self._resume(run, state["effect"]),
            step=int(state["step"]),
            record=state["record"],
        )

    def ended(self, run: TrainingRun, state: Mapping[str, Any]) -> Applied:
        """Return the record of one that is no longer in force.

        It counts among those tried, and changes nothing.

        Args:
            run: the run.
            state: a value of :meth:`Applied.state_dict`.

        Returns:
            Its record, with ``active`` False.

        Example:
            >>> import torch
            >>> from stabmon.interventions.stop import Stop
            >>> run = TrainingRun(torch.nn.Linear(2, 1))
            >>> state = Stop().apply(run).state_dict()
            >>> Stop().ended(TrainingRun(run.model), state).active
            False
        """
        over = Applied(self, run, Effect(), step=int(state["step"]), record=state["record"])
        over.active = False
        return over

    def check_saved(self, effect: Stored) -> None:
        """Check the stored state of its effect, without changing anything.

        Args:
            effect: the state, as read from a checkpoint.

        Raises:
            ValueError: if it is no such state, naming the place.

        Example:
            >>> from stabmon.interventions.extend_warmup import ExtendWarmup
            >>> ExtendWarmup().check_saved(Stored({"first": 3}, "effect"))
            >>> ExtendWarmup().check_saved(Stored({"first": "3"}, "effect"))
            Traceback (most recent call last):
            ValueError: ...
        """
        effect.mapping()

    @abstractmethod
    def _start(self, run: TrainingRun) -> Effect:
        """Change the run and return the effect.

        Raises:
            NotApplicable: if it does not fit; then nothing may have changed.
        """

    def _resume(self, run: TrainingRun, state: Mapping[str, Any]) -> Effect:
        """Return the effect again after a restart, from a value of its ``state_dict``.

        Here nothing is held: the whole effect is in the weights.
        """
        return Effect(note="its effect is in the checkpoint; it can no longer be undone")


INTERVENTIONS: Registry[type[Intervention]] = Registry(
    "intervention", package="stabmon.interventions"
)
I_ = TypeVar("I_", bound=type[Intervention])


def intervention(cls: I_) -> I_:
    """Register an intervention under its class name in snake case.

    ``QkClip`` is ``qk_clip``.

    Args:
        cls: a dataclass derived from :class:`Intervention`.

    Returns:
        The class itself.

    Raises:
        ValueError: if the name is taken.

    Example:
        >>> _ = INTERVENTIONS["stop"]
        >>> @intervention
        ... class Stop(Intervention):
        ...     "A second one."
        Traceback (most recent call last):
        ValueError: intervention 'stop' is registered twice, ...
    """
    INTERVENTIONS.register(intervention_name(cls), cls)
    return cls
