"""The engine: when to sample, what to capture, compute and judge, and where it goes. Knows no signal, rule or sink by name.

One optimizer step, with what a monitor does at each mark::

    begin_step()             <- arm the capture, if this step is sampled
      forward (micro-batch)  <- capture attention calls, reduce each to one number a head
      backward
      …                         more micro-batches
    before_optimizer_step()  <- gradient norms, if sampled; replay the batch, if something is not finite
      optimizer.step()
    on_step(loss)            <- one reading -> rules -> issues -> sinks -> Diagnosis
"""

from __future__ import annotations

import functools
import logging
import math
import platform
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from types import TracebackType
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from stabmon.capture import AttentionCapture, clean_name, compiled_modules
from stabmon.config import StabilityConfig, load_config
from stabmon.distributed import RankReducer
from stabmon.forward_watch import ForwardWatch
from stabmon.non_finite import ForwardCall, RandomState, count_bad, find_in_forward, find_in_gradients
from stabmon.records import AttentionCall, Diagnosis, LayerInfo, NonFinite, Reading, StabilityIssue
from stabmon.rules.history import History
from stabmon.rules.tracker import IssueTracker
from stabmon.signals.measure import HeadSums, measure, operator_of
from stabmon.sinks import Sink, SinkGroup
from stabmon.sinks.scalars import dashboard_scalars

logger = logging.getLogger("stabmon")
P = ParamSpec("P")
R = TypeVar("R")
_SMALL = 1 << 16
"""Parameters of at most this many values serve to notice a non-finite gradient at every step."""


def _safely(method: Callable[P, R]) -> Callable[P, R | None]:
    """What fails inside is logged once, counted and skipped; the time it takes counts as overhead."""

    @functools.wraps(method)
    def guarded(*args: P.args, **kwargs: P.kwargs) -> R | None:
        monitor: Any = args[0]
        started = time.perf_counter()
        try:
            return method(*args, **kwargs)
        except Exception as error:
            monitor._failed(method.__name__.strip("_"), error)
            return None
        finally:
            monitor._spent += time.perf_counter() - started

    return guarded


class AttentionStabilityMonitor:
    """Watches the attention of a model in training, and changes nothing about it.

    Call :meth:`on_step` once after each optimizer step and :meth:`close` (or leave the context) at the end. Nothing here raises into
    the training loop but bad arguments to the constructor.

    Args:
        model: the model as it is called in training: plain, compiled, wrapped by DDP or FSDP.
        optimizer: its step is when gradients are looked at and failing batches replayed; without one neither is done.
        lr_scheduler: accepted for symmetry with the callbacks; its rates are read from the optimizer.
        config: a preset's name, a YAML file's path, or a :class:`~stabmon.config.StabilityConfig`.
        log_every: sample every N-th optimizer step; the first is step 1, so N = 50 samples 50, 100, …
        sinks: names or :class:`~stabmon.sinks.Sink` objects, instead of the configuration's.
        run_dir: records go to ``<run_dir>/stabmon``; None keeps them in memory only.
        reduce_ranks: under torch.distributed, reduce sampled steps over all ranks. Every rank must then have a monitor.
        is_writer: whether this process writes to the sinks; None for rank 0 only.
        manual_steps: :meth:`begin_step` and :meth:`before_optimizer_step` are called from outside, as the integrations do.
        loss_from_output: take the loss from the forward's output where ``on_step`` is given none.
        grad_scaler: the gradient scaler in use, whose overflows are not reported; None for ``optimizer.scaler`` if there is one.
        **overrides: other fields of the configuration.

    Raises:
        ValueError: for a configuration, name or value that cannot be, naming it and the mend.
        TypeError: if ``model`` is no ``nn.Module``.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer | None = None,
        lr_scheduler: Any = None,
        config: str | Path | StabilityConfig | None = "observe",
        *,
        log_every: int | None = None,
        sinks: Sequence[str | Sink] | None = None,
        run_dir: str | Path | None = None,
        reduce_ranks: bool = False,
        is_writer: bool | None = None,
        manual_steps: bool = False,
        loss_from_output: bool = True,
        grad_scaler: Any = None,
        **overrides: Any,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model is a {type(model).__name__}: give the torch.nn.Module that is trained")
        self.config = load_config(config, log_every=log_every, sinks=sinks, **overrides)
        self.model = model
        self.optimizer = optimizer
        self.lr_scheduler = lr_scheduler
        self.step = 0
        """Optimizer steps seen, those before a resume included."""
        self.issues: list[StabilityIssue] = []
        """Every issue emitted so far, in order."""
        self.errors: Counter[str] = Counter()
        """What failed inside, by place; each is logged the first time."""
        self.run_dir = None if run_dir is None else Path(run_dir) / "stabmon"
        self._writes = self._is_first_rank() if is_writer is None else is_writer
        self._sinks = SinkGroup(self.config.make_sinks() if self._writes else [])
        self._opened = self._closed = False
        self._tracker = IssueTracker(
            self.config.make_rules(),
            history=History(self.config.history),
            clear_after=self.config.clear_after,
            cooldown_steps=self.config.cooldown * self.config.log_every,
            on_error=lambda error: self._failed("rule", error),
        )
        self._ranks = RankReducer() if reduce_ranks else None
        self._capture = self._make_capture()
        self._generator = torch.Generator().manual_seed(0)
        self._watch: ForwardWatch | None = None
        self._optimizer_hook: Any = None
        self._manual = manual_steps
        self._loss_from_output = loss_from_output
        self._grad_scaler = grad_scaler if grad_scaler is not None else getattr(optimizer, "scaler", None)
        self._spent, self._since = 0.0, time.perf_counter()
        self._missed_samples = 0
        self._looked = self._capturing = False
        self._clear_step()
        self._losses: list[tuple[int, float | Tensor]] = []
        self._non_finite: NonFinite | None = None
        """The first bad tensor of the present run of non-finite steps; None while all is finite."""
        self._is_news = False
        self._gradients: dict[str, float] = {}
        if not manual_steps:
            self._hook_optimizer()
            self.begin_step()

    # -- the marks of a step ------------------------------------------------------------------------------------------

    @_safely
    def begin_step(self) -> None:
        """Get ready for the next optimizer step. Only integrations call this: ``on_step`` does it in a loop of one's own."""
        self._clear_step()
        if self._closed:
            return
        if not self._opened:
            self._open_sinks()
        wanted = self.config.watch_every_step or self.is_sampled(self.step + 1)
        if wanted and self._watch is None:
            self._watch = ForwardWatch(self.model, compiled_around(self.model), self._forward_begins, self._forward_ends)
        elif not wanted and self._watch is not None:
            self._watch.remove()
            self._watch = None

    @_safely
    def before_optimizer_step(self) -> None:
        """Look at gradients while they and the parameters that made them are still there."""
        if self._closed or self._looked:
            return
        self._looked = True
        if self.is_sampled(self.step + 1):
            self._gradients = gradient_norms(self.model, self._layers)
        if self.config.watch_every_step:
            self._look_for_non_finite()

    def on_step(self, loss: Tensor | float | None = None) -> Diagnosis | None:
        """Take note that an optimizer step has been made.

        Args:
            loss: the step's loss; a tensor is detached, and read only when a sampled step needs it.

        Returns:
            A :class:`~stabmon.records.Diagnosis` on sampled steps, and on a step at which a NaN or inf first comes up; else None.
        """
        if self._closed:
            return None
        self.step += 1
        diagnosis = self._finish_step(loss)
        if not self._manual:
            self.begin_step()
        return diagnosis

    def is_sampled(self, step: int) -> bool:
        """Whether optimizer step ``step``, counted from 1, is sampled."""
        return step % self.config.log_every == 0

    def get_intervention(self, diagnosis: Diagnosis) -> None:
        """What to do about a diagnosis: None, since an observing monitor changes nothing; see each issue's suggestion."""
        return None

    @property
    def open_issues(self) -> tuple[StabilityIssue, ...]:
        """Every issue open now, as last emitted."""
        return self._tracker.open_issues

    def close(self) -> None:
        """Leave the model as it was found and close the sinks; may be called twice."""
        if self._closed:
            return
        self._closed = True
        self._let_go()
        self._sinks.close()

    def __enter__(self) -> AttentionStabilityMonitor:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def state_dict(self) -> dict[str, Any]:
        """All that a resumed monitor needs to go on where this one is: plain values, for JSON with NaN or ``torch.save``."""
        return {"step": self.step, "issues": [issue.to_dict() for issue in self.issues], "tracker": self._tracker.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where :meth:`state_dict` was taken.

        Raises:
            ValueError: if ``state`` is no monitor's state.
        """
        if missing := {"step", "issues", "tracker"} - set(state):
            raise ValueError(f"monitor state without {sorted(missing)[0]!r}: give what state_dict() returned")
        self.step = int(state["step"])
        self.issues = [StabilityIssue.from_dict(issue) for issue in state["issues"]]
        self._tracker.load_state_dict(state["tracker"])
        if not self._manual:
            self.begin_step()

    # -- inside a step ------------------------------------------------------------------------------------------------

    @_safely
    def _forward_begins(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.is_grad_enabled() or not any(each.training for each in module.modules()):
            return
        self._forwards.append(ForwardCall(module, args, kwargs, RandomState.now()))
        if self.is_sampled(self.step + 1):
            self._capture.__enter__()
            self._capturing = True

    @_safely
    def _forward_ends(self, module: nn.Module, output: Any) -> None:
        if self._capturing:
            self._capturing = False
            self._capture.__exit__()
            self._seen_calls += sum(self._capture.calls.values())
            self._missed_calls += self._capture.unseen
        if self._forwards and self._forwards[-1].module is module:
            loss = loss_of(output) if self._loss_from_output else None
            if loss is not None:
                self._outputs.append(loss)
        if output is None and sys.exc_info()[0] is not None:
            self._let_go()  # the forward raised, and nobody may come to close us; the next step arms again

    def add_loss(self, loss: Tensor) -> None:
        """Tell the (part of the) step's loss that a micro-batch is about to be differentiated by; parts are added up."""
        self._outputs.append(loss.detach())

    def _on_call(self, call: AttentionCall) -> None:
        started = time.perf_counter()
        operator = operator_of(call, self.config.engine)
        found = measure(operator, self.config.signals, sample_rows=self.config.sample_rows, generator=self._generator)
        known = self._sums.get(call.layer)
        same = known is not None and all(known[name].total.shape == each.total.shape for name, each in found.items())
        self._sums[call.layer] = {name: known[name].merge(each) for name, each in found.items()} if known and same else found
        self._info[call.layer] = LayerInfo(
            heads=operator.heads,
            head_dim=operator.head_dim,
            scale=call.scale,
            dtype=str(call.dtype).removeprefix("torch."),
            fused=call.fused,
            softcap=call.softcap,
        )
        if call.module is not None:
            self._layers[call.layer] = call.module
        self._spent += time.perf_counter() - started

    @_safely
    def _finish_step(self, loss: Tensor | float | None) -> Diagnosis | None:
        if self._capturing:  # an exception took the forward's end away
            self._capturing = False
            self._capture.__exit__()
        self._note_loss(loss)
        sampled = self.is_sampled(self.step)
        if not sampled and not self._is_news:
            return None
        layers = self._read_out()
        if not layers and sampled:
            self._say_what_was_missed()
        if sampled and not self._looked:
            self._gradients = gradient_norms(self.model, self._layers)
        losses = tuple((step, float(value)) for step, value in self._losses)
        reading = Reading(
            step=self.step,
            loss=losses[-1][1] if losses and losses[-1][0] == self.step else None,
            layers=layers,
            info=dict(self._info),
            learning_rate=self._learning_rate(),
            gradients=self._gradients,
            losses=losses,
            micro_batches=max(1, len(self._forwards)),
            non_finite=self._non_finite,
            overhead_fraction=self._overhead(),
        )
        self._losses, self._gradients, self._is_news = [], {}, False
        return self._judge(reading, sampled)

    def _judge(self, reading: Reading, sampled: bool) -> Diagnosis:
        issues = self._tracker.update(reading)
        self.issues += issues
        open_issues = self._tracker.open_issues
        alarms = sum(issue.is_alarm for issue in self.issues)
        if sampled:
            self._sinks.write_reading(reading, dashboard_scalars(reading, open_issues, alarms=alarms))
        for issue in issues:
            self._sinks.write_issue(issue)
        readings = tuple(self._tracker.history.readings)
        return Diagnosis(reading.step, tuple(issues), reading.layers, readings, open_issues)

    def _read_out(self) -> dict[str, dict[str, np.ndarray]]:
        """The step's signals over micro-batches and ranks, brought to the host in one transfer."""
        sums: Mapping[str, Mapping[str, HeadSums]] = self._sums
        if self._ranks is not None:
            sums = self._ranks.reduce(sums)
        entries = [(layer, name, each) for layer, signals in sums.items() for name, each in signals.items()]
        if not entries:
            return {}
        device = entries[0][2].total.device
        flat = torch.cat([each.value.double().to(device) for *_, each in entries]).cpu().numpy()
        layers: dict[str, dict[str, np.ndarray]] = {}
        at = 0
        for layer, name, each in entries:
            heads = each.total.numel()
            layers.setdefault(layer, {})[name] = flat[at : at + heads].copy()
            at += heads
        return layers

    def _note_loss(self, loss: Tensor | float | None) -> None:
        if loss is None and self._outputs:
            total = torch.stack([value.float() for value in self._outputs])
            partial = not self._loss_from_output or any("num_items_in_batch" in call.kwargs for call in self._forwards)
            loss = total.sum() if partial else total.mean()
        if loss is None:
            return
        value = loss.detach() if isinstance(loss, Tensor) else float(loss)
        if isinstance(value, Tensor) and value.device.type == "cpu":
            value = float(value)
        self._losses.append((self.step, value))
        if isinstance(value, float) and not self._looked:
            self._tell(None if math.isfinite(value) else NonFinite(self.step, "loss", None, None, "loss", f"loss is {value}"))

    def _look_for_non_finite(self) -> None:
        """Replay the step's batch if its loss or a gradient is not finite."""
        bad_loss = any(not bool(value.isfinite().all()) for value in self._outputs)
        bad_gradient = any(count_bad(p.grad) for p in self._sentinels() if p.grad is not None)
        if not bad_loss and (not bad_gradient or (self._grad_scaler is not None and self._grad_scaler.is_enabled())):
            self._tell(None)  # a scaler meets non-finite gradients daily, and skips the step by itself
            return
        if self._non_finite is not None:
            return  # the same misfortune goes on: what came first has been found
        step, found = self.step + 1, None
        try:
            found = find_in_forward(self.model, self._forwards, step)
        except Exception as error:
            self._failed("replay", error)
        found = found or find_in_gradients(self.model, step)
        self._tell(found or NonFinite(step, "loss", None, None, "loss", "finite again when the batch was replayed"))

    def _tell(self, found: NonFinite | None) -> None:
        """Take note of a step that is not finite, or of one that is."""
        self._is_news = self._is_news or (found is not None and self._non_finite is None)
        self._non_finite = (self._non_finite or found) if found is not None else None

    def _sentinels(self) -> list[nn.Parameter]:
        """A few small parameters, the first and the last of the model: where a non-finite gradient arrives, and where it starts."""
        small = [p for p in self.model.parameters() if p.requires_grad and p.grad is not None and p.numel() <= _SMALL]
        return small[:2] + small[-2:]

    # -- set-up and small things --------------------------------------------------------------------------------------

    def _make_capture(self) -> AttentionCapture:
        modules = self.config.attention_modules
        return AttentionCapture(self.model, self._on_call, modules=modules, on_error=lambda error: self._failed("capture", error))

    def _clear_step(self) -> None:
        self._sums: dict[str, dict[str, HeadSums]] = {}
        self._info: dict[str, LayerInfo] = {}
        self._layers: dict[str, nn.Module] = {}
        self._forwards: list[ForwardCall] = []
        self._outputs: list[Tensor] = []
        self._capturing = self._looked = False
        self._seen_calls = self._missed_calls = 0

    def _hook_optimizer(self) -> None:
        register = getattr(self.optimizer, "register_step_pre_hook", None)
        if register is not None:
            self._optimizer_hook = register(lambda *_: self.before_optimizer_step())

    def _let_go(self) -> None:
        """Take out whatever is in the model or the optimizer."""
        if self._capturing:
            self._capturing = False
            self._capture.__exit__()
        if self._watch is not None:
            self._watch.remove()
            self._watch = None
        if self._optimizer_hook is not None:
            self._optimizer_hook.remove()
            self._optimizer_hook = None
        self._clear_step()

    def _say_what_was_missed(self) -> None:
        """A sampled step without a single attention call is an error that says what was looked for."""
        self._missed_samples += 1
        if not self._forwards:
            why = (
                "no training forward of the model was seen (a forward with gradients, in train mode, called on the model given to "
                "stabmon and not inside a compiled function)"
            )
        elif self._missed_calls:
            why = "attention ran inside a compiled function, where nothing is seen: compile the model, not the function around it"
        else:
            why = f"no attention was found in {type(self.model).__name__}; looked for {self._capture.looked_for()}"
            why += "; name hand-written attention in attention_modules=[...]"
        self._failed("sampling", RuntimeError(f"step {self.step}: {why}"))

    def _open_sinks(self) -> None:
        self._opened = True
        if self._writes and self.run_dir is not None:
            self.run_dir.mkdir(parents=True, exist_ok=True)
        self._sinks.open(self.run_dir, self._meta())

    def _meta(self) -> dict[str, Any]:
        """What meta.json says of this run."""
        packages = {}
        for name in ("stabmon", "torch", "transformers", "lightning", "numpy"):
            try:
                packages[name] = version(name)
            except PackageNotFoundError:
                continue
        return {
            "versions": {"python": platform.python_version(), **packages},
            "config": self.config.to_dict(),
            "model": {
                "class": type(self.model).__name__,
                "parameters": sum(p.numel() for p in self.model.parameters()),
                "trainable": sum(p.numel() for p in self.model.parameters() if p.requires_grad),
            },
            "sampling": {"every": self.config.log_every, "unit": "optimizer step", "first": self.config.log_every},
        }

    def _learning_rate(self) -> float | None:
        groups = getattr(self.optimizer, "param_groups", None)
        return max(float(group["lr"]) for group in groups) if groups else None

    def _overhead(self) -> float:
        now = time.perf_counter()
        wall, self._since = now - self._since, now
        spent, self._spent = self._spent, 0.0
        return min(1.0, spent / wall) if wall > 0 else 0.0

    def _failed(self, where: str, error: Exception) -> None:
        self.errors[where] += 1
        if self.errors[where] == 1:
            logger.error(
                "%s failed and is skipped, training goes on: %s", where, error, exc_info=not isinstance(error, RuntimeError)
            )

    @staticmethod
    def _is_first_rank() -> bool:
        return not (torch.distributed.is_available() and torch.distributed.is_initialized()) or torch.distributed.get_rank() == 0


def compiled_around(model: nn.Module) -> list[nn.Module]:
    """Compiled wrappers that hold ``model``, or the model itself where it was compiled in place: what its callers really call."""
    return [m for m in compiled_modules(model) if m is model or any(inner is model for inner in m.modules())][:1]


def gradient_norms(model: nn.Module, layers: Mapping[str, nn.Module]) -> dict[str, float]:
    """L2 norm of the gradient of each attention module's own parameters, and of all parameters under ``""``; empty without gradients."""
    groups = {"": [p.grad for p in model.parameters() if p.grad is not None]}
    groups |= {layer: [p.grad for p in module.parameters() if p.grad is not None] for layer, module in layers.items()}
    groups = {name: grads for name, grads in groups.items() if grads}
    if not groups or any(type(grad).__name__ == "DTensor" or grad.is_sparse for grad in groups[""]):
        return {}
    with torch.no_grad():
        norms = {id(grad): norm for grad, norm in zip(groups[""], torch._foreach_norm(groups[""]), strict=True)}
        total = [torch.stack([norms[id(g)].float() for g in grads if id(g) in norms]).norm() for grads in groups.values()]
        values = torch.stack(total).tolist()
    return {clean_name(name) if name else name: value for name, value in zip(groups, values, strict=True)}


def loss_of(output: Any) -> Tensor | None:
    """The scalar loss in a forward's output, detached, where there is one: ``.loss``, ``["loss"]``, a scalar, or a tuple's first."""
    found = getattr(output, "loss", None)
    if found is None and isinstance(output, Mapping):
        found = output.get("loss")
    if found is None and isinstance(output, tuple) and output:
        found = output[0]
    if found is None and isinstance(output, Tensor):
        found = output
    return found.detach() if isinstance(found, Tensor) and found.dim() == 0 and found.is_floating_point() else None
