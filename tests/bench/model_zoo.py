"""Train every small model class of transformers with and without stabmon.

python tests/bench/model_zoo.py [--only NAME...] [--sample N] [--bare] [--jobs N] [--json FILE]

One class at a time makes two training steps plain and two watched, which must agree bit for bit.
Then its attention is compared with what the dispatcher shows of one more forward: every softmax of
what came of a product, whose result is multiplied with another tensor, is attention, and every call
that stabmon captured must give the same probabilities in float64. Each class ends as one of

- exact: all attention is captured, to 1e-3 of a probability at most;
- partly, said / none, said: some is missing, and the monitor names it;
- SILENT: some is missing, and nothing is said (must be 0);
- WRONG: something is captured that is no attention, or other probabilities (must be 0);
- HARM: losses, gradients or weights differ, or stabmon raises or logs an error (must be 0);
- FALSE: all is captured, and yet something is said to be missing (must be 0);
- no attention; or not small, with the reason.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import os
import random
import resource
import signal
import subprocess
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.overrides import TorchFunctionMode

# private path of a documented class that sees every operator below autograd; torch 2.13
from torch.utils._python_dispatch import TorchDispatchMode

sys.path.insert(0, str(Path(__file__).parents[2]))

from tests.bench.small_models import NotSmallError, batch_for, build, class_names
from tests.support.probability_oracle import probabilities

SECONDS, BYTES, CLASSES = 60, 5 << 30, 40
"""Processor time and memory of a class, and number of classes per process."""
MUST_BE_NONE = ("SILENT", "WRONG", "HARM", "FALSE")
NEAR = 1e-3


class TooSlow(BaseException):
    """Error of a class beyond its time; not an Exception, so that nothing swallows it."""


class Fused(TorchFunctionMode):
    """Marker of a running ``scaled_dot_product_attention``, for a dispatch mode."""

    def __init__(self, record: Dispatched) -> None:
        super().__init__()
        self.record = record

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        before, self.record.fused = (
            self.record.fused,
            self.record.fused or func is nn.functional.scaled_dot_product_attention,
        )
        try:
            return func(*args, **(kwargs or {}))
        finally:
            self.record.fused = before


class Dispatched(TorchDispatchMode):
    """Record of every softmax of a product of two tensors with a weighted result.

    As the dispatcher shows it.
    """

    KEEP = (
        "_to_copy",
        "clone",
        "mul",
        "where",
        "masked_fill",
        "view",
        "_unsafe_view",
        "expand",
        "unsqueeze",
        "squeeze",
        "slice",
    )
    KEEP += (
        "transpose",
        "permute",
        "t",
        "native_dropout",
        "bernoulli",
        "div",
        "select",
        "index",
        "split",
        "alias",
        "detach",
        "unbind",
    )
    KEEP += (
        "nan_to_num",
        "copy",
        "reshape",
        "div_",
        "mul_",
        "masked_fill_",
        "chunk",
        "split_with_sizes",
        "cat",
        "add",
    )

    MAKE_NEW = (
        "bmm",
        "mm",
        "addmm",
        "baddbmm",
        "convolution",
        "native_layer_norm",
        "embedding",
        "_softmax",
        "native_group_norm",
    )
    """Operations after which a tensor is no score any more."""

    def __init__(self, parameters: set[int]) -> None:
        super().__init__()
        self.weights: dict[int, Tensor] = {}
        self._of: dict[int, tuple[Tensor, frozenset[int]]] = {}
        self._scores: dict[int, Tensor] = {}
        self._softmax: dict[int, Tensor] = {}
        self._parameters = parameters
        self.fused = False
        """True while torch's own attention runs, which is attention whatever its inputs."""
        self._kept: list[Tensor] = []
        self._sums: dict[int, Tensor] = {}
        self._outputs: dict[int, tuple[Tensor, frozenset[int]]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        # the operator's qualified name; checked with torch 2.13
        name = func._schema.name.removeprefix("aten::")
        given = [
            a
            for part in (args, *(a for a in args if isinstance(a, list | tuple)))
            for a in part
            if isinstance(a, Tensor)
        ]
        made = [
            t
            for t in (result if isinstance(result, list | tuple) else (result,))
            if isinstance(t, Tensor)
        ]
        if given and name in self.KEEP and all(id(t) in self._parameters for t in given):
            self._kept += made  # so that their ids are not used again
            self._parameters.update(map(id, made))
        products = name in ("bmm", "baddbmm", "mm", "_cdist_forward") and (
            self.fused or not any(id(t) in self._parameters for t in given[-2:])
        )
        if products or (
            name not in self.MAKE_NEW and any(storage(t) in self._scores for t in given)
        ):
            self._scores |= {storage(t): t for t in made}
        if name in ("_softmax", "_safe_softmax") and storage(args[0]) in self._scores:
            logits = args[0].movedim(args[1], -1)
            sees = logits.amax(-1, keepdim=True) > torch.finfo(logits.dtype).min / 2
            self._softmax[id(result)] = result.movedim(args[1], -1).where(sees, torch.nan)
            self._of[id(result)] = (result, frozenset({id(result)}))
            return result
        self._scale(name, given, result)
        tensors = [
            a
            for a in (*args, *(args[0] if args and isinstance(args[0], list | tuple) else ()))
            if isinstance(a, Tensor)
        ]
        origins = frozenset().union(*(self._of[id(a)][1] for a in tensors if id(a) in self._of))
        if origins and name not in self.MAKE_NEW:
            for each in result if isinstance(result, list | tuple) else (result,):
                if isinstance(each, Tensor):
                    self._of[id(each)] = (each, origins)
        elif origins and name in ("bmm", "mm", "matmul", "baddbmm"):
            for a in tensors:
                if id(a) in self._of and not any(
                    id(b) in self._parameters or not b.is_floating_point()
                    for b in tensors
                    if b is not a
                ):
                    self.weights |= {key: self._softmax[key] for key in self._of[id(a)][1]}
                    self._outputs[storage(result)] = (result, self._of[id(a)][1])
        return result

    def _scale(self, name: str, given: list[Tensor], result: Any) -> None:
        """Apply a sink after the softmax.

        A factor of the weighted values, made of the logsumexp of the scores.
        """
        if not given or not isinstance(result, Tensor):
            return
        kept = (
            name in (*self.KEEP, "sub", "rsub", "neg", "sigmoid", "exp")
            and storage(given[0]) in self._sums
        )
        if kept or (name == "logsumexp" and storage(given[0]) in self._scores):
            self._sums[storage(result)] = result
        if name in ("mul", "mul_") and len(given) == 2:
            for output, factor in (given, given[::-1]):
                if (
                    storage(output) in self._outputs
                    and storage(factor) in self._sums
                    and factor.shape[-1] == 1
                ):
                    for key in self._outputs[storage(output)][1]:
                        self.weights[key] = self.weights[key] * factor


def storage(tensor: Tensor) -> int:
    """Return the key of a tensor's memory, common to its views."""
    # address of the StorageImpl, unique while it lives; checked with torch 2.13
    return int(tensor.untyped_storage()._cdata)


def rows_of(p: Tensor, keys: int, direction: Tensor) -> Tensor:
    """Return one number per row of probabilities, sorted.

    So the layout of batch and heads does not matter.
    """
    rows = p.reshape(-1, p.shape[-1]).double()
    rows = torch.where(
        rows.sum(-1, keepdim=True).isfinite(), rows, 1 / keys
    )  # no key visible: whatever the weights are
    return (rows @ direction[: p.shape[-1]]).sort().values


def unmatched(found: list[Tensor], captured: list[Tensor]) -> tuple[int, int]:
    """Count softmaxes without an equal captured call, and the reverse."""
    direction = (
        torch.rand(1 << 16, dtype=torch.float64, generator=torch.Generator().manual_seed(7)) + 0.5
    )
    left = [rows_of(p, p.shape[-1], direction) for p in captured]
    missing = 0
    for p in found:
        for cut in (p, p[..., :-1]):  # the last column may be a sink
            rows = rows_of(cut, p.shape[-1], direction)
            near = [
                i
                for i, q in enumerate(left)
                if q.shape == rows.shape and (not len(q) or (q - rows).abs().max() < NEAR)
            ]
            if near:
                del left[near[0]]
                break
        else:
            missing += 1
    return missing, len(left)


def loss_of(output: Any) -> Tensor:
    """Return the mean square of every float tensor in the model's output."""
    from stabmon.capture.coverage.op_trace import tensors_in

    parts = [
        t.float().square().mean()
        for t in tensors_in(output)
        if t.is_floating_point() and t.requires_grad
    ]
    if not parts:
        raise NotSmallError("nothing that it returns can be differentiated")
    return torch.stack(parts).sum()


def train(
    model: nn.Module, batch: Mapping[str, Any], monitor: Any = None, steps: int = 2
) -> list[Tensor]:
    """Return losses, gradients, weights and the next random numbers of some steps."""
    torch.manual_seed(2)
    optimizer = monitor.optimizer if monitor else torch.optim.AdamW(model.parameters(), lr=1e-3)
    kept = []
    for _ in range(steps):
        loss = loss_of(model(**batch))
        loss.backward()
        kept += [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]
        optimizer.step()
        optimizer.zero_grad()
        if monitor:
            monitor.on_step(loss=loss)
    return [*kept, *(p.detach().clone() for p in model.parameters()), torch.rand(2)]


def alike(one: list[Tensor], other: list[Tensor]) -> bool:
    """Return whether two runs agree to the bit, NaN included."""
    return len(one) == len(other) and all(
        torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0)) for a, b in zip(one, other, strict=True)
    )


def examine(name: str, model_type: str) -> tuple[str, str]:
    """Examine one class; return its outcome and the reason."""
    made: tuple[Any, ...] = ()
    reasons = []
    for thoroughly, images in ((True, False), (True, True), (False, False)):
        try:
            model = build(name, model_type, thoroughly=thoroughly)
            batch = batch_for(model, images=images)
            plain = train(model, batch)
            made = (thoroughly, batch)
            break
        except MemoryError:
            reasons.append("out of memory")
        except Exception as error:
            reasons.append(
                f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"[:110]
            )
    if not made:
        return "not small", reasons[0] if "pixel" not in reasons[0] and "NoneType" not in reasons[
            0
        ] else reasons[1]
    import stabmon
    from stabmon.capture import AttentionCapture

    model = build(name, model_type, thoroughly=made[0])
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    try:
        with stabmon.AttentionStabilityMonitor(model, optimizer, log_every=1, sinks=[]) as monitor:
            watched = train(model, batch, monitor)
        errors, unseen = dict(monitor.errors), monitor.unseen
    except Exception as error:
        return "HARM", f"watched, it raises {type(error).__name__}: {error}"[:140]
    if not alike(plain, watched):
        if alike(plain, train(build(name, model_type, thoroughly=made[0]), batch)):
            return "HARM", "losses, gradients or weights are not the same to the bit"
        return "not small", "two plain runs differ"
    if errors.keys() - {"sampling"}:
        return "HARM", f"errors {errors}"

    with contextlib.suppress(Exception):
        model.set_attn_implementation("eager")
    calls: list[Tensor] = []
    torch.manual_seed(3)
    dispatched = Dispatched({id(p) for p in model.parameters()})
    capture = AttentionCapture(model.eval(), lambda call: calls.append(probabilities(call)))
    with (
        torch.no_grad(),
        sdpa_kernel(SDPBackend.MATH),
        dispatched,
        Fused(dispatched),
        capture,
    ):  # in parts, where nothing is eager
        model(**batch)
    missing, extra = unmatched(list(dispatched.weights.values()), calls)
    said = bool(unseen) or bool(capture.witness.unseen) or "sampling" in errors
    detail = f"{len(dispatched.weights) - missing} of {len(dispatched.weights)}"
    named = "; ".join(f"{module}: {words}" for module, words in list(unseen.items())[:2])
    if not dispatched.weights and not calls:
        return ("FALSE", named) if unseen else ("no attention", "")
    if extra:
        return "WRONG", f"{detail}; {extra} captured calls equal no softmax"
    if missing:
        return (
            "partly, said" if calls else "none, said"
        ) if said else "SILENT", f"{detail} {named}"
    return ("FALSE", named) if unseen else ("exact", detail)


def work(names: list[str]) -> None:
    """Examine classes one after the other, a line each on standard output."""
    known = class_names("MODEL")
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    os.environ["HF_HUB_OFFLINE"] = "1"
    out = os.fdopen(os.dup(1), "w")
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)

    def late(*_: Any) -> None:
        raise TooSlow(f"took more than {SECONDS} s of processor time")

    signal.signal(signal.SIGPROF, late)
    for name in names:
        print(json.dumps({"name": name}), file=out, flush=True)
        began = time.perf_counter()
        signal.setitimer(signal.ITIMER_PROF, SECONDS)
        try:
            outcome, detail = examine(name, known[name])
        except BaseException as error:
            outcome, detail = "not small", f"bench: {type(error).__name__}: {error}"[:140]
        signal.setitimer(signal.ITIMER_PROF, 0)
        row = {
            "name": name,
            "outcome": outcome,
            "detail": detail,
            "seconds": round(time.perf_counter() - began, 1),
        }
        print(json.dumps(row), file=out, flush=True)


def results(names: list[str], jobs: int) -> Iterator[dict[str, Any]]:
    """Return a row for each class, from processes isolated from each other."""
    waiting, running = list(names), []
    while waiting or running:
        while waiting and len(running) < jobs:
            some, waiting = waiting[:CLASSES], waiting[CLASSES:]
            process = subprocess.Popen(
                [sys.executable, __file__, "--work", *some],
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
            )
            running.append((process, some))
        process, some = running.pop(0)
        current, done = None, set()
        assert process.stdout is not None
        for line in process.stdout:
            row = json.loads(line)
            if "outcome" in row:
                done.add(row["name"])
                yield row
            else:
                current = row["name"]
        process.wait()
        left = [name for name in some if name not in done]
        if left and current in left:
            yield {
                "name": current,
                "outcome": "not small",
                "detail": f"its process ended with {process.returncode}",
                "seconds": 0.0,
            }
            left.remove(current)
        waiting = left + waiting


def main() -> int:
    """Parse the command line and run."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", metavar="NAME", help="these classes")
    parser.add_argument("--sample", type=int, metavar="N", help="N classes drawn with --seed")
    parser.add_argument("--bare", action="store_true", help="the bare models of every kind as well")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=2, metavar="N", help="processes at a time")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the rows here as well")
    parser.add_argument("--work", nargs="+", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        work(arguments.work)
        return 0
    names = arguments.only or list(class_names(*(["MODEL"] if arguments.bare else [])))
    if arguments.sample is not None:
        names = sorted(
            random.Random(arguments.seed).sample(names, min(arguments.sample, len(names)))
        )
    began, rows = time.perf_counter(), []
    for row in results(names, arguments.jobs):
        rows.append(row)
        print(
            f"{row['name']:<48} {row['outcome']:<13} {row['seconds']:5.1f} s  {row['detail']}",
            flush=True,
        )
    if arguments.json:
        arguments.json.write_text(json.dumps(rows, indent=1) + "\n")
    totals = Counter(row["outcome"] for row in rows)
    print(
        f"\n{len(rows)} classes in {time.perf_counter() - began:.0f} s: "
        + ", ".join(f"{n} {k}" for k, n in totals.most_common())
    )
    failed = {outcome: totals[outcome] for outcome in MUST_BE_NONE}
    print("must be none: " + ", ".join(f"{n} {outcome}" for outcome, n in failed.items()))
    return int(any(failed.values()))


if __name__ == "__main__":
    sys.exit(main())
