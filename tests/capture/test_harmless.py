"""Neutrality: a capture changes nothing of a model's training and leaves nothing behind."""

import copy
import logging
import random
import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)
from transformers.modeling_utils import AttentionInterface

from stabmon.capture import AttentionCapture
from stabmon.records import AttentionCall
from tests.support.attention_zoo import (
    BATCH,
    LENGTH,
    WIDTH,
    Attention,
    Tower,
    gpt2,
    noise,
    seeded,
    zoo,
)
from tests.support.rank_faults import at_entries
from tests.support.sweeps import sweep

ZOO = zoo()
TRAINED = [
    "gpt2-sdpa",
    "mistral-eager",
    "bloom",
    "falcon-sdpa",
    "transformer_encoder",
    "multihead-weights",
    "hand_written-alibi",
]


def ignore(call: AttentionCall) -> None:
    """Compute the statistics that a monitor would, and keep nothing."""
    if call.query is not None and call.key is not None:
        (call.query.float().norm() * call.key.float().norm() * call.scale).exp()


def surroundings(model: nn.Module) -> tuple[Any, ...]:
    """Return all state in which a capture could leave something behind."""
    import torch._dynamo.eval_frame as dynamo

    hooks = [
        (len(m._forward_pre_hooks), len(m._forward_hooks), m.__dict__.get("_compiled_call_impl"))
        for m in model.modules()
    ]
    functions = nn.functional.scaled_dot_product_attention, nn.functional.softmax
    return (
        AttentionInterface.get_interface,
        dynamo._maybe_set_eval_frame,
        functions,
        _get_current_function_mode_stack(),
        hooks,
    )


def loss_of(model: nn.Module, inputs: dict[str, Any]) -> Tensor:
    output = model(**inputs)
    tensor = (
        output
        if isinstance(output, Tensor)
        else next(v for v in output.values() if isinstance(v, Tensor) and v.ndim > 1)
    )
    return tensor.float().square().mean()


def train(
    model: nn.Module, inputs: dict[str, Any], *, watched: bool, steps: int = 3
) -> list[Tensor]:
    torch.manual_seed(3)
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-4)
    capture = AttentionCapture(model, ignore)
    losses = []
    for step in range(steps):
        if watched and step != 1:
            with capture:
                loss = loss_of(model, inputs)
                loss.backward()
            assert capture.calls
        else:
            loss = loss_of(model, inputs)
            loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.detach())
    assert all(loss.isfinite() for loss in losses)
    return [*losses, *(p.detach().clone() for p in model.parameters()), torch.rand(3)]


@pytest.mark.parametrize("name", TRAINED)
def test_training_is_the_same_to_the_bit(name: str) -> None:
    model, inputs = ZOO[name]()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.1
    twin = copy.deepcopy(model)
    before = surroundings(model)
    for own, other in zip(
        train(model, inputs, watched=True), train(twin, inputs, watched=False), strict=True
    ):
        assert torch.equal(own, other)
    assert surroundings(model) == before


def test_nothing_is_left_after_an_exception_in_mid_forward() -> None:
    for name in ("gpt2-sdpa", "multihead-fused", "hand_written-manual"):
        model, inputs = ZOO[name]()
        before = surroundings(model)

        def interrupt(call: AttentionCall) -> None:
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt), AttentionCapture(model, interrupt):
            model(**inputs)
        assert surroundings(model) == before


FAULTY = sweep(
    (
        "multihead-weights",
        "hand_written-alibi",
        "gpt2-sdpa",
        "multihead-fused",
        "mistral-eager",
        "hand_written-einsum",
        "gpt_oss-eager",
    ),
    keep=3,
)


@pytest.mark.parametrize("name", FAULTY)
def test_a_fault_at_any_function_of_capture_is_kept_from_the_forward(name: str) -> None:
    model, inputs = ZOO[name]()
    model.train()
    capture_errors: list[Exception] = []

    def forward(act: Callable[[str], None], only: str | None = None) -> Tensor:
        # new each time, so that all of them watch torch functions and look for unseen attention
        capture = AttentionCapture(model, ignore, on_error=capture_errors.append)
        torch.manual_seed(1)
        with capture, at_entries(act, only):
            return loss_of(model, inputs)

    torch.manual_seed(1)
    expected = loss_of(model, inputs)
    places: dict[str, None] = {}
    forward(lambda place: places.setdefault(place))
    before = surroundings(model)
    assert len(places) > 20
    for place in places:
        fired: list[str] = []

        def plant(place: str, fired: list[str] = fired) -> None:
            if not fired:
                fired.append(place)
                raise ArithmeticError(place)

        capture_errors.clear()
        assert torch.equal(forward(plant, place), expected), place
        assert surroundings(model) == before, place
        assert not fired or capture_errors, place


def test_an_error_in_the_receiver_is_reported_and_the_model_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = ZOO["gpt2-sdpa"]()
    expected = model(**inputs).logits

    def fail(call: AttentionCall) -> None:
        raise ValueError(call.layer)

    errors: list[Exception] = []
    with AttentionCapture(model, fail, on_error=errors.append):
        assert torch.equal(model(**inputs).logits, expected)
    assert [str(error) for error in errors] == ["transformer.h.0.attn", "transformer.h.1.attn"]
    with caplog.at_level(logging.WARNING), AttentionCapture(model, fail):
        model(**inputs)
    assert caplog.text.count("attention capture failed") == 1


def test_an_error_in_the_receiver_of_errors_does_not_reach_the_model(
    caplog: pytest.LogCaptureFixture,
) -> None:
    model, inputs = ZOO["gpt2-sdpa"]()

    def fail(_: object) -> None:
        raise ValueError("no")

    with caplog.at_level(logging.WARNING), AttentionCapture(model, fail, on_error=fail):
        model(**inputs)
    assert "receiver" in caplog.text


def test_the_receiver_runs_without_gradients_autocast_and_modes() -> None:
    for name in ("gpt2-eager", "hand_written-manual", "multihead-fused"):
        model, inputs = ZOO[name]()
        seen: list[tuple[Any, ...]] = []

        def look(call: AttentionCall, seen: list[tuple[Any, ...]] = seen) -> None:
            state = (
                torch.is_grad_enabled(),
                torch.is_autocast_enabled("cpu"),
                _get_current_function_mode_stack(),
            )
            seen.append(
                (
                    *state,
                    nn.functional.scaled_dot_product_attention(*[torch.ones(1, 1, 2, 2)] * 3).dtype,
                )
            )

        with AttentionCapture(model, look) as capture, torch.autocast("cpu", torch.bfloat16):
            model(**inputs)
        assert seen
        assert set(map(str, seen)) == {str((False, False, [], torch.float32))}
        assert sum(capture.calls.values()) == len(seen)


def test_the_random_generators_are_not_drawn_from() -> None:
    model, inputs = ZOO["bloom"]()
    before = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist()  # noqa: NPY002
    with AttentionCapture(model, ignore):
        model(**inputs)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (random.getstate(), np.random.get_state()[1].tolist()) == before[1:]  # noqa: NPY002


def test_a_second_model_is_not_seen() -> None:
    for name in ("gpt2-sdpa", "hand_written-manual", "multihead-fused"):
        (model, inputs), (teacher, _) = ZOO[name](), ZOO[name]()

        class Student(nn.Module):
            def __init__(self, model: nn.Module, teacher: nn.Module) -> None:
                super().__init__()
                self.model = model
                self.teacher = [teacher]

            def forward(self, **inputs: Any) -> Any:
                self.teacher[0](**inputs)
                return self.model(**inputs)

        student = Student(model, teacher)
        layers: list[str] = []
        with AttentionCapture(student, lambda call, layers=layers: layers.append(call.layer)):
            teacher(**inputs)
            student(**inputs)
        assert len(layers) == len({*layers}) == (1 if name == "multihead-fused" else 2)


class Checkpointed(nn.Module):
    """A tower whose blocks run under activation checkpointing."""

    def __init__(self, tower: nn.Module, **options: Any) -> None:
        super().__init__()
        self.blocks, self.options = tower.blocks, options

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, **self.options)
        return x


def selective() -> Any:
    """Return selective checkpointing that keeps the results of every second operation."""
    return create_selective_checkpoint_contexts(
        lambda ctx, op, *args, **kwargs: CheckpointPolicy.MUST_SAVE
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_reentrant": True},
        {"use_reentrant": False},
        {"use_reentrant": False, "context_fn": selective},
    ],
)
@pytest.mark.parametrize("how", ["fused", "manual"])
def test_a_checkpointed_layer_is_seen_once_and_its_gradients_stay(
    how: str, options: dict[str, Any]
) -> None:
    model = Checkpointed(seeded(lambda: Tower(lambda: Attention(how))), **options)
    x = noise(BATCH, LENGTH, WIDTH).requires_grad_()
    gradients = []
    for watched in (False, True):
        model.zero_grad()
        layers: list[str] = []

        def look(call: AttentionCall, layers: list[str] = layers) -> None:
            layers.append(call.layer)
            (call.query @ call.key.mT).softmax(-1)

        capture = AttentionCapture(model, look)
        if watched:
            with capture:
                model(x).square().mean().backward()
            assert layers == ["blocks.0", "blocks.1"]
        else:
            model(x).square().mean().backward()
        gradients.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_transformers_own_checkpointing_is_seen_once() -> None:
    model, inputs = gpt2("sdpa")
    model.gradient_checkpointing_enable()
    with AttentionCapture(model, ignore) as capture:
        model(**inputs, labels=inputs["input_ids"]).loss.backward()
    assert capture.calls == {"transformers": 2}


def test_forwards_of_other_threads_are_not_seen() -> None:
    for name in ("gpt2-sdpa", "multihead-fused", "hand_written-fused"):
        model, inputs = ZOO[name]()
        with AttentionCapture(model, ignore) as capture:
            thread = threading.Thread(target=lambda model=model, inputs=inputs: model(**inputs))
            thread.start()
            thread.join()
        assert capture.calls == {}


def test_a_suspended_capture_sees_nothing_and_leaves_nothing() -> None:
    model, inputs = ZOO["gpt2-sdpa"]()
    before = surroundings(model)
    with AttentionCapture(model, ignore) as capture:
        with capture.suspended():
            assert surroundings(model) == before
            model(**inputs)
        assert capture.calls == {}
        model(**inputs)
        assert capture.calls == {"transformers": 2}
    assert surroundings(model) == before


def test_an_open_capture_cannot_be_entered_again_but_a_closed_one_can() -> None:
    model, inputs = ZOO["gpt2-sdpa"]()
    capture = AttentionCapture(model, ignore)
    for _ in range(2):
        with capture:
            with pytest.raises(RuntimeError, match="open already"):
                capture.__enter__()
            model(**inputs)
        assert capture.calls == {"transformers": 2}


def test_two_captures_see_the_same_calls() -> None:
    for name in ("gpt2-sdpa", "hand_written-manual", "multihead-fused"):
        model, inputs = ZOO[name]()
        with AttentionCapture(model, ignore) as outer, AttentionCapture(model, ignore) as inner:
            model(**inputs)
        assert outer.calls == inner.calls != {}


def test_torch_functions_are_watched_no_longer_once_the_interface_shows_everything() -> None:
    model, inputs = ZOO["gpt2-sdpa"]()
    quick, always_watch_functions = (
        AttentionCapture(model, ignore),
        AttentionCapture(model, ignore, always_watch_functions=True),
    )
    for opening in range(4):
        for capture, watched in ((quick, opening < 2), (always_watch_functions, True)):
            with capture:
                assert bool(_get_current_function_mode_stack()) == watched
                model(**inputs)
            assert capture.calls == {"transformers": 2}
    with quick:
        pass
    with quick:
        assert _get_current_function_mode_stack()


def test_an_attention_function_of_another_package_is_seen_by_its_torch_functions() -> None:
    def doubled(
        module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, **_: Any
    ) -> Any:
        return nn.functional.scaled_dot_product_attention(
            2 * query, key, value, is_causal=True
        ).transpose(1, 2), None

    model, inputs = gpt2("sdpa")
    calls: list[AttentionCall] = []
    with AttentionCapture(model, calls.append):
        model(**inputs)
    AttentionInterface.register("doubled", doubled)
    try:
        model.set_attn_implementation("doubled")
        with AttentionCapture(model, calls.append) as capture:
            model(**inputs)
    finally:
        del AttentionInterface._global_mapping["doubled"]
    assert capture.calls == {"sdpa": 2}
    assert calls[2].layer == calls[0].layer
    torch.testing.assert_close(calls[2].query, 2 * calls[0].query)


def test_a_model_without_attention_gets_the_list_of_kinds_looked_for() -> None:
    with AttentionCapture(nn.Linear(2, 2), ignore) as capture:
        capture.model(torch.ones(1, 2))
    assert capture.calls == {}
    assert "scaled_dot_product_attention" in capture.looked_for()
    assert "\n" not in capture.looked_for()
