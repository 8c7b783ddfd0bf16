"""Copies of a training run's state, on the host or on disk."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from stabmon._storage.atomic_write import replace_whole
from stabmon._torch.optimizer_adapter import state_of
from stabmon._torch.process_group import rank, world_size
from stabmon._torch.tensors import local
from stabmon.interventions.run.training_run import TrainingRun

SNAPSHOT_VERSION = 1
"""Version of a snapshot's file; one without a version is older, and read the same way."""


@dataclass(frozen=True, eq=False)
class Snapshot:
    """State of a run after one optimizer step, of this rank's shards.

    It holds parameters, buffers, optimizer state, schedulers and gradient scaler.
    """

    step: int
    tensors: Mapping[str, Tensor]
    optimizer: list[dict[str, Any]]
    """The state of each parameter, in the order of the groups of all optimizers."""
    groups: list[dict[str, Any]]
    """Each group's settings, without its parameters."""
    scheduler: list[dict[str, Any]]
    """The state of each scheduler."""
    scaler: dict[str, Any] | None
    beside: list[list[str]] = field(default_factory=list)
    """For each entry of ``optimizer``, the names of numbers that lay on the parameter's device.

    Fused and capturable optimizers keep their ``step`` there, all others on the host. Empty in
    files of earlier versions, where the groups' settings say it.
    """
    rank: int | None = None
    """The rank whose shards these are; None in files of earlier versions."""
    ranks: int | None = None
    """Number of ranks of the run."""

    @classmethod
    @torch.no_grad()
    def take(cls, run: TrainingRun) -> Snapshot:
        """Copy the state to the host."""
        return cls(
            step=run.step,
            rank=rank(),
            ranks=world_size(),
            tensors={name: _copied(tensor) for name, tensor in named_tensors(run)},
            optimizer=[
                {k: _copied(v) for k, v in state.get(p, {}).items()} for p, state in stepped(run)
            ],
            beside=[
                [k for k, v in state.get(p, {}).items() if _is_number_beside(v, p)]
                for p, state in stepped(run)
            ],
            groups=[
                {k: _copied(v) for k, v in group.settings.items() if k != "params"}
                for group in run.groups
            ],
            scheduler=[_copied(each.state_dict()) for each in run.schedulers],
            scaler=_copied(run.grad_scaler.state_dict()) if run.grad_scaler is not None else None,
        )

    @torch.no_grad()
    def restore(self, run: TrainingRun, *, schedule: bool) -> None:
        """Set the run to this state in place, bit for bit.

        Random generators stay as they are.

        Args:
            run: the run that it was taken of.
            schedule: restore schedulers, rates and other settings of groups as well; without, they
                stay as they are now.
        """
        for name, tensor in named_tensors(run):
            if name in self.tensors:
                local(tensor.detach()).copy_(self.tensors[name])
        beside = self.beside or [
            ["step"] if group.settings.get("fused") or group.settings.get("capturable") else []
            for group in run.groups
            for _ in group.parameters
        ]
        states = zip(stepped(run), self.optimizer, beside, strict=True)
        for (parameter, state), saved, names in states:
            _restore_entries(
                state[parameter] if saved or parameter in state else {},
                saved,
                local(parameter).device,
                names,
            )
            if not saved:
                state.pop(parameter, None)
        if schedule:
            for group, settings in zip(run.groups, self.groups, strict=True):
                _restore_settings(group.settings, settings)
            for scheduler, saved in zip(run.schedulers, self.scheduler, strict=True):
                scheduler.load_state_dict(_copied(saved))
        if self.scaler:
            run.grad_scaler.load_state_dict(_copied(self.scaler))

    def explain_misfit(self, run: TrainingRun) -> str:
        """Return why this is no state of this rank's part of the run; empty if it is.

        Args:
            run: the run to be restored.
        """
        if self.rank is not None and self.rank != rank():
            return f"is the state of rank {self.rank}, and this is rank {rank()}"
        for name, tensor in named_tensors(run):
            saved = self.tensors.get(name)
            if saved is not None and saved.shape != local(tensor).shape:
                were = "" if self.ranks is None else f" of {self.ranks} ranks"
                return (
                    f"holds {name} with shape {list(saved.shape)}, and this rank's part has "
                    f"{list(local(tensor).shape)}: it is of a run{were} that shards otherwise"
                )
        if len(self.optimizer) != len(list(stepped(run))):
            return "is of an optimizer with other parameters"
        return ""

    def digest(self) -> str:
        """Return a hash of the step, the rank and every bit of all tensors."""
        found = hashlib.sha256(f"{self.step} {self.rank} {self.ranks}".encode())
        for name, tensor in self.tensors.items():
            found.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            found.update(bytes_of(tensor))
        for entries in self.optimizer:
            for name, value in entries.items():
                found.update(name.encode())
                found.update(bytes_of(value) if isinstance(value, Tensor) else repr(value).encode())
        return found.hexdigest()

    def save(self, path: Path) -> None:
        """Write it to a file, which afterwards is complete or absent."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        values |= {"version": SNAPSHOT_VERSION, "digest": self.digest()}
        replace_whole(path, lambda fresh: torch.save(values, fresh))

    @classmethod
    def load(cls, path: Path) -> Snapshot:
        """Read a file that :meth:`save` wrote.

        Raises:
            ValueError: if the file is damaged or of a later version.
        """
        try:
            values = torch.load(path, map_location="cpu", weights_only=True)
            version, digest = values.pop("version", SNAPSHOT_VERSION), values.pop("digest", None)
            if not isinstance(values["scheduler"], list):  # written when a run had one at most
                values["scheduler"] = [] if values["scheduler"] is None else [values["scheduler"]]
            if version == SNAPSHOT_VERSION:
                found = cls(**values)
                if digest not in (None, found.digest()):
                    raise RuntimeError("its bits are not those that were written")
                return found
        except Exception as error:  # what torch raises for a damaged file is of many kinds
            words = str(error).partition("\n")[0]
            raise ValueError(
                f"{path} holds no state to go back to ({type(error).__name__}: {words})"
            ) from error
        raise ValueError(
            f"{path} is of version {version}, but this stabmon reads {SNAPSHOT_VERSION}: update "
            "stabmon"
        )


def bytes_of(tensor: Tensor) -> Any:
    """Return the bits of a tensor on the host."""
    whole = tensor.contiguous().reshape(-1)
    return whole.view(torch.uint8).numpy() if len(whole) else b""


def snapshot_bytes(run: TrainingRun) -> int:
    """Return the size of a snapshot taken now, in bytes."""
    state = [
        value
        for p, state in stepped(run)
        for value in state.get(p, {}).values()
        if isinstance(value, Tensor)
    ]
    return sum(
        local(t).numel() * t.element_size()
        for t in [*(tensor for _, tensor in named_tensors(run)), *state]
    )


def named_tensors(run: TrainingRun) -> Iterator[tuple[str, Tensor]]:
    """Return parameters and buffers of the model, and master weights of the optimizer."""
    yield from run.model.named_parameters()
    yield from run.model.named_buffers()
    own = {id(parameter) for parameter in run.model.parameters()}
    others = [parameter for parameter, _ in stepped(run) if id(parameter) not in own]
    yield from ((f"optimizer's own {at}", parameter) for at, parameter in enumerate(others))


def stepped(run: TrainingRun) -> list[tuple[Tensor, Any]]:
    """Return each parameter beside its optimizer's whole state, in the order of all groups."""
    return [(each, state_of(group.optimizer)) for group in run.groups for each in group.parameters]


def _copied(value: Any) -> Any:
    """Copy a value, with its tensors, to the host."""
    if isinstance(value, Tensor):
        return local(value.detach()).to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {k: _copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(v) for v in value) if type(value) in (list, tuple) else value
    return value


def _is_number_beside(value: Any, parameter: Tensor) -> bool:
    """Return whether a value is a tensor of one number on the parameter's device."""
    return isinstance(value, Tensor) and not value.ndim and value.device == parameter.device


def _restore_settings(settings: MutableMapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Make a group's settings what was saved, in their own tensors.

    A captured graph reads the rate from the tensor that it was captured with.
    """
    for name, value in saved.items():
        now = settings.get(name)
        if isinstance(value, Tensor) and isinstance(now, Tensor) and now.shape == value.shape:
            now.copy_(value)
        else:
            settings[name] = _copied(value)


def _restore_entries(
    entries: dict[str, Any],
    saved: Mapping[str, Any],
    device: torch.device,
    beside: Sequence[str] = (),
) -> None:
    """Set an optimizer's state of a parameter, in its present tensors if possible.

    Single numbers named in ``beside`` are made anew on ``device``, others on the CPU.
    """
    for name in set(entries) - set(saved):
        del entries[name]
    for name, value in saved.items():
        now = entries.get(name)
        if (
            isinstance(value, Tensor)
            and isinstance(now, Tensor)
            and local(now).shape == value.shape
            and now.dtype == value.dtype
        ):
            local(now).copy_(value)
        else:
            entries[name] = (
                value.to(device, copy=True)
                if isinstance(value, Tensor) and (value.ndim or name in beside)
                else _copied(value)
            )
