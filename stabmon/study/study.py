"""Do controllers help? Each trained on a frozen base, and with it from scratch, over seeds, beside
controls of the same size.

For every seed the base is trained first. Then each variant's own parameters are trained on that
base, which is frozen; and each variant is trained from scratch, base and all, on the same data in
the same order as the base was. LossAccumulator are compared within a seed. Tasks run side by side in
processes of their own; each leaves a file when it is done, and a resumed study skips those.
"""

from __future__ import annotations

import dataclasses
import json
import multiprocessing
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import torch

from stabmon._settings import Bounds, Count, Known, NonEmpty, Positive, check
from stabmon.config import load_config
from stabmon.controllers import ControllerWatch, save_controllers
from stabmon.controllers.attach import find_controllers
from stabmon.engine.monitor import AttentionStabilityMonitor
from stabmon.study.fit import Phase, Watch, fit
from stabmon.study.pictures import draw, draw_generation
from stabmon.study.settings import CorpusSettings, SettingsError, WatchSettings
from stabmon.study.variants import BASE, VARIANTS, put_variant
from stabmon.tiny.corpus import load_corpus
from stabmon.tiny.language_models import Shape, make_model

Kind = Literal["frozen", "joint"]
VariantName = Annotated[str, Known(VARIANTS, "variant")]


@dataclass(frozen=True)
class StudySettings:
    """What ``configs/controllers/*.yaml`` say."""

    run_dir: str
    seeds: Annotated[list[int], NonEmpty()] = field(default_factory=lambda: [0, 1, 2])
    """Each is a base of its own: weights, and order of the data."""
    workers: Annotated[int, Bounds(0)] = 2
    """Processes at a time, each of one thread; 0 to do everything in this one."""
    resume: bool = False
    """Skip the tasks that ``run_dir`` holds results of."""
    corpus: CorpusSettings = field(default_factory=CorpusSettings)
    model: Shape = field(default_factory=Shape)
    bias_max: Positive = 1.0
    """See :class:`stabmon.controllers.info_density.InfoDensity`."""
    gain_max: Positive = 4.0
    base: Phase = field(default_factory=Phase)
    """Training from scratch, of the base and in the joint comparison."""
    controllers: Phase = field(default_factory=lambda: Phase(learning_rate=1e-2, weight_decay=0.0))
    """Training of what a variant adds to the frozen base."""
    stabmon: WatchSettings | None = None
    """Train the first seed from scratch under watch, records in ``<run_dir>/watched/<task>``; None
    to train unwatched.
    """
    watch_every: Count | None = 10
    """Training steps between looks at what the first seed's controllers do; None for none."""
    frozen: list[VariantName] = field(default_factory=list)
    """Variants that are trained on the frozen base."""
    joint: list[VariantName] = field(default_factory=list)
    """Variants that are trained from scratch with their base."""

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
        """Of its files."""
        return f"{self.kind}-{self.variant}-{self.seed}"


def tasks(settings: StudySettings) -> list[Task]:
    """Every training of a study: bases first, then what needs none, then what needs them."""
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


def run_study(settings: StudySettings, progress: Callable[[str], None] = lambda line: None) -> Path:
    """Train everything that has no result yet.

    Args:
        settings: the study.
        progress: told a line after each task.

    Returns:
        The folder of results, one JSON file a task.

    Raises:
        SettingsError: if the settings are wrong, or do not fit what ``run_dir`` holds.
        CorpusError: if the text cannot be used.
    """
    folder = prepare(settings)
    everything = tasks(settings)
    waiting = [
        task for task in everything if not (folder / "results" / f"{task.name}.json").exists()
    ]
    began, done = time.monotonic(), len(everything) - len(waiting)
    for task, result in finished(settings, waiting):
        done += 1
        elapsed = time.monotonic() - began
        progress(
            f"[{done}/{len(everything)}, {elapsed:.0f} s] {task.name}: held-out loss "
            f"{result['held_out']:.4f}"
        )
    shown = [name for name in settings.frozen if VARIANTS[name].controller]
    if shown:
        learned = [name for name in shown if VARIANTS[name].controller == "info_density"] or shown
        seed = settings.seeds[0]
        draw_generation(
            settings.model, settings.corpus, folder, Task("frozen", learned[-1], seed).name, seed
        )
    return folder


def finished(settings: StudySettings, waiting: list[Task]) -> Iterator[tuple[Task, dict[str, Any]]]:
    """Run tasks, and give each as it ends; those on a frozen base wait for their base."""
    if settings.workers == 0:
        yield from ((task, perform(settings, task)) for task in waiting)
        return
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(
        settings.workers, mp_context=context, initializer=torch.set_num_threads, initargs=(1,)
    ) as pool:
        bases = {task for task in waiting if task.variant == BASE}
        blocked = [
            task
            for task in waiting
            if task.kind == "frozen" and Task("joint", BASE, task.seed) in bases
        ]
        running: dict[Future[dict[str, Any]], Task] = {
            pool.submit(perform, settings, task): task for task in waiting if task not in blocked
        }
        try:
            while running:
                future = next(as_completed(running))
                task = running.pop(future)
                yield task, future.result()
                ready = [each for each in blocked if task == Task("joint", BASE, each.seed)]
                blocked = [each for each in blocked if each not in ready]
                running |= {pool.submit(perform, settings, each): each for each in ready}
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def prepare(settings: StudySettings) -> Path:
    """The study's folder, with its settings in it."""
    if settings.stabmon is not None:
        try:
            load_config(**dataclasses.asdict(settings.stabmon))
        except ValueError as error:
            raise SettingsError(f"stabmon: {error}") from error
    corpus = load_corpus(**dataclasses.asdict(settings.corpus))
    if len(corpus.validation) < 2:
        raise SettingsError(
            f"corpus: {corpus.source} leaves {len(corpus.validation)} held-out blocks: use a "
            "longer text"
        )
    make_model(settings.model, settings.corpus.block)
    folder = Path(settings.run_dir)
    about = {
        "settings": dataclasses.asdict(settings),
        "corpus": {"source": corpus.source, "sha256": corpus.sha256},
    }
    known = folder / "study.json"
    if known.exists():
        if not settings.resume:
            raise SettingsError(
                f"run_dir {folder} holds a study already: go on with resume=true, or name another "
                "run_dir"
            )
        if what_matters(json.loads(known.read_text())) != what_matters(about):
            raise SettingsError(
                f"run_dir {folder} holds a study with other settings: name another run_dir"
            )
    (folder / "results").mkdir(parents=True, exist_ok=True)
    known.write_text(json.dumps(about, indent=2) + "\n")
    return folder


def what_matters(about: dict[str, Any]) -> dict[str, Any]:
    """The part of a study's description that its single results depend on."""
    left_out = {
        "run_dir",
        "resume",
        "workers",
        "seeds",
        "watch_every",
        "stabmon",
        "frozen",
        "joint",
    }
    return {
        **about,
        "settings": {
            name: value for name, value in about["settings"].items() if name not in left_out
        },
    }


def perform(settings: StudySettings, task: Task) -> dict[str, Any]:
    """One task: train, write the weights, then the result."""
    folder = Path(settings.run_dir)
    corpus = load_corpus(**dataclasses.asdict(settings.corpus))
    torch.manual_seed(task.seed)
    model = make_model(settings.model, settings.corpus.block)
    limits = {"bias_max": settings.bias_max, "gain_max": settings.gain_max}
    base_file = folder / "weights" / f"base-{task.seed}.pt"
    if task.kind == "frozen":
        model.load_state_dict(torch.load(base_file, weights_only=True))
    added = put_variant(model, task.variant, limits)
    parameters = added if task.kind == "frozen" else list(model.parameters())
    phase = settings.controllers if task.kind == "frozen" else settings.base
    first = bool(parameters) and task.seed == settings.seeds[0]
    with watched(model, folder / "series" / task.name, settings.watch_every if first else None):
        fitted = fit(model, parameters, corpus, phase, task.seed, make_watch(settings, task, model))
    if task.variant == BASE:
        base_file.parent.mkdir(exist_ok=True)
        torch.save(model.state_dict(), base_file.with_suffix(".tmp"))
        base_file.with_suffix(".tmp").replace(base_file)
    keep_controllers(model, folder / "controllers" / task.name, task)
    result = (
        dataclasses.asdict(task)
        | dataclasses.asdict(fitted)
        | {"added_parameters": sum(each.numel() for each in added)}
    )
    path = folder / "results" / f"{task.name}.json"
    path.with_suffix(".tmp").write_text(json.dumps(result) + "\n")
    path.with_suffix(".tmp").replace(path)
    return result


def make_watch(settings: StudySettings, task: Task, model: torch.nn.Module) -> Watch | None:
    """How to watch the training of a task; None for not at all."""
    watch = settings.stabmon
    if watch is None or task.kind != "joint" or task.seed != settings.seeds[0]:
        return None
    folder = Path(settings.run_dir) / "watched" / task.name
    return lambda optimizer, schedule: AttentionStabilityMonitor(
        model,
        optimizer,
        schedule,
        config=watch.config,
        log_every=watch.log_every,
        sinks=["jsonl"],
        run_dir=folder,
    )


@contextmanager
def watched(model: torch.nn.Module, folder: Path, every: int | None) -> Iterator[None]:
    """Time series of a model's controllers in training, and their pictures; nothing where ``every``
    is None or there are none.
    """
    if every is None or not find_controllers(model):
        yield
        return
    with ControllerWatch(model, every=every, training_only=True, run_dir=folder) as watch:
        yield
    draw(watch, folder)


def keep_controllers(model: torch.nn.Module, folder: Path, task: Task) -> None:
    """Save the controllers of a variant that has some; a joint base beside them, which they are
    worth nothing without.
    """
    if not find_controllers(model):
        return
    save_controllers(model, folder)
    if task.kind == "joint":
        torch.save(
            {name: value for name, value in model.state_dict().items() if "stabmon" not in name},
            folder / "base.pt",
        )
