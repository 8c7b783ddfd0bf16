"""The plan of a study: its settings and its tasks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from stabmon._settings import Bounds, Count, Known, NonEmpty, Positive, check
from stabmon.study.fit import Phase
from stabmon.study.settings import CorpusSettings, WatchSettings
from stabmon.study.variants import BASE, VARIANTS
from stabmon.tiny.language_models import Shape

Kind = Literal["frozen", "joint"]
VariantName = Annotated[str, Known(VARIANTS, "variant")]


@dataclass(frozen=True)
class StudySettings:
    """Settings of a study, as in ``configs/controllers/*.yaml``."""

    run_dir: str
    seeds: Annotated[list[int], NonEmpty()] = field(default_factory=lambda: [0, 1, 2])
    """Seeds; each has a base of its own: weights, and order of the data."""
    workers: Annotated[int, Bounds(0)] = 2
    """Processes at a time, each of one thread; 0 for this process alone."""
    resume: bool = False
    """Skip the tasks with results in ``run_dir``."""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: Shape = field(default_factory=Shape)
    bias_max: Positive = 1.0
    """Bound of info_density's key bias, in nats."""
    gain_max: Positive = 4.0
    base: Phase = field(default_factory=Phase)
    """Training from scratch, of the base and in the joint comparison."""
    controllers: Phase = field(default_factory=lambda: Phase(learning_rate=1e-2, weight_decay=0.0))
    """Training of a variant's own parameters on the frozen base."""
    stabmon: WatchSettings | None = None
    """Monitor of the first seed's trainings from scratch; None for none.

    Its records lie in ``<run_dir>/watched/<task>``.
    """
    watch_every: Count | None = 10
    """Training steps between samples of the first seed's controllers; None for none."""
    frozen: list[VariantName] = field(default_factory=list)
    """Variants to train on the frozen base."""
    joint: list[VariantName] = field(default_factory=list)
    """Variants to train from scratch with their base."""

    def __post_init__(self) -> None:
        check(self)


@dataclass(frozen=True)
class Task:
    """One training."""

    kind: Kind
    variant: str
    seed: int

    @property
    def name(self) -> str:
        """Return the name of its files."""
        return f"{self.kind}-{self.variant}-{self.seed}"


def tasks(settings: StudySettings) -> list[Task]:
    """List every training of a study, bases first.

    Then those from scratch, which need no base, then those on a frozen base.
    """
    found = [Task("joint", BASE, seed) for seed in settings.seeds]
    found += [
        Task("joint", each, seed)
        for each in settings.joint
        if each != BASE
        for seed in settings.seeds
    ]
    return found + [
        Task("frozen", each, seed)
        for each in settings.frozen
        if each != BASE
        for seed in settings.seeds
    ]
