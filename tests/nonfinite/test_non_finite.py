"""NaN and inf are found at their step and traced to their tensor.

Training goes on as it would have.
"""

import math
from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import stabmon
from stabmon.records import NonFinite
from tests.support.small_runs import (
    HEADS,
    Floats,
    batches,
    clean,
    gpt2,
    llama,
    optimizer_of,
    same_bits,
    train,
    weights,
)

HEAD_DIM = 32 // HEADS


def watch(model, optimizer, **options):
    own = {"config": "observe", "sinks": [], "log_every": 100, "schedule": "fixed"}
    settings = own | options
    return stabmon.AttentionStabilityMonitor(model, optimizer, **settings)


def first_bad(given):
    """(step, layer, head, tensor) of the only issue, which came at an unsampled step."""
    (issue,) = [issue for each in given if each for issue in each.issues]
    assert issue.issue_type == "non_finite"
    assert issue.state == "opened"
    return issue.step, issue.layer, issue.head, issue.evidence["tensor"]


def twins(make, plant, *, steps=6, at=3, log_every=100):
    """Train with and without a monitor, both with the same bad values; return what on_step gave,
    and the monitor.
    """
    ends = []
    for watched in (False, True):
        torch.manual_seed(2)
        model = make()
        optimizer = optimizer_of(model)
        monitor = watch(model, optimizer, log_every=log_every) if watched else None

        def between(step, model=model):
            if step == at:
                with torch.no_grad():
                    plant(model)

        given = train(model, monitor, optimizer, batches(steps), between=between)
        ends.append(weights(model) | {"random": torch.get_rng_state().float()})
    monitor.close()
    assert same_bits(*ends)
    assert not monitor.errors
    assert clean(model)
    return given, monitor


def test_a_nan_in_the_query_weights_of_one_head_is_named_with_its_head():
    def plant(model):
        model.model.layers[1].self_attn.q_proj.weight[2 * HEAD_DIM + 3, 5] = math.nan

    given, _ = twins(lambda: llama(attention_dropout=0.1), plant)
    assert first_bad(given) == (3, "model.layers.1.self_attn.q_proj", 2, "weight")


def test_a_nan_in_the_key_weights_of_grouped_heads_is_named_with_the_first_of_the_group():
    def plant(model):
        model.model.layers[0].self_attn.k_proj.weight[HEAD_DIM + 1, 0] = math.nan

    given, _ = twins(llama, plant)
    assert first_bad(given) == (3, "model.layers.0.self_attn.k_proj", 2, "weight")


def test_a_nan_in_the_value_weights_is_named_with_its_head():
    def plant(model):
        model.transformer.h[1].attn.c_attn.weight[3, 2 * 32 + 3 * HEAD_DIM] = math.nan

    given, _ = twins(gpt2, plant)
    assert first_bad(given) == (3, "transformer.h.1.attn.c_attn", 3, "weight")


@pytest.mark.parametrize(("column", "head"), [(HEAD_DIM, 1), (32 + 3 * HEAD_DIM + 2, 3)])
def test_a_nan_in_a_column_of_fused_projections_is_named_with_its_head(column, head):
    def plant(model):
        model.transformer.h[0].attn.c_attn.weight[7, column] = math.nan

    given, _ = twins(lambda: gpt2(dropout=0.1), plant)
    assert first_bad(given) == (3, "transformer.h.0.attn.c_attn", head, "weight")


@pytest.mark.parametrize("make", [gpt2, llama])
def test_a_nan_in_the_output_projection_is_of_no_head(make):
    def plant(model):
        layers = model.transformer.h if make is gpt2 else model.model.layers
        projection = layers[1].attn.c_proj if make is gpt2 else layers[1].self_attn.o_proj
        feature = (0, 9) if make is gpt2 else (9, 0)  # one feature that leaves, over all heads
        projection.weight[feature] = torch.nan

    given, _ = twins(make, plant)
    step, layer, head, _ = first_bad(given)
    assert (step, head) == (3, None)
    assert layer.rpartition(".")[2] in ("c_proj", "o_proj")


def test_a_nan_outside_of_attention_has_no_head():
    def plant(model):
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan

    given, _ = twins(gpt2, plant)
    assert first_bad(given) == (3, "transformer.h.1.mlp.c_fc", None, "weight")


def test_an_episode_is_traced_once_while_it_lasts(monkeypatch):
    traced = []
    original = stabmon.nonfinite.tracer.find_in_forward
    monkeypatch.setattr(
        "stabmon.nonfinite.tracer.find_in_forward",
        lambda *args: traced.append(args[-1]) or original(*args),
    )

    def plant(model):
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan

    given, monitor = twins(gpt2, plant, steps=20, log_every=5)
    assert traced == [3]
    assert (
        len(
            [
                issue
                for each in given
                if each
                for issue in each.issues
                if issue.issue_type == "non_finite"
            ]
        )
        == 1
    )
    assert given[4].readings[-1].non_finite.layer == "transformer.h.1.mlp.c_fc"
    assert [issue.issue_type for issue in monitor.open_issues] == ["non_finite"]


def test_a_single_bad_batch_closes_again_and_a_later_one_is_traced_anew():
    model = Floats()
    monitor = watch(model, torch.optim.SGD(model.parameters(), 0.0), log_every=5, cooldown=0)
    given = []
    for step in range(1, 41):
        x = torch.randn(2, 6, 32)
        if step in (3, 31):
            x[1, 2, 3] = math.inf
        model(x).square().mean().backward()
        monitor.optimizer.step()
        with torch.no_grad():
            for parameter, kept in zip(model.parameters(), Floats().parameters(), strict=True):
                parameter.copy_(kept)  # rolled back
        monitor.optimizer.zero_grad()
        given.append(monitor.on_step())
    monitor.close()
    assert [(issue.step, issue.state) for issue in monitor.issues] == [
        (3, "opened"),
        (10, "closed"),
        (31, "opened"),
        (40, "closed"),
    ]
    assert [issue.evidence["tensor"] for issue in monitor.issues] == ["argument 0"] * 4


class Overflows(nn.Module):
    """Attention by hand whose scores are formed in half precision, as eager kernels form them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32, bias=False) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        scores = (query.half() @ key.half().transpose(-1, -2)) * HEAD_DIM**-0.5
        return self.o((scores.float().softmax(-1) @ value).transpose(1, 2).flatten(-2))


def steps_on_floats(
    model, plant, *, steps=4, at=3, loss_of=lambda out: out.square().mean(), **options
):
    """Train watched and unwatched on float inputs; ``plant(model, x)`` brings the bad values about
    in the ``at``-th step's batch.
    """
    ends, given = [], []
    for watched in (False, True):
        twin = model()
        optimizer = optimizer_of(twin)
        monitor = watch(twin, optimizer, **options) if watched else None
        torch.manual_seed(4)
        for step in range(1, steps + 1):
            x = torch.randn(2, 6, 32)
            if step == at:
                with torch.no_grad():
                    plant(twin, x)
            loss_of(twin(x)).backward()
            nn.utils.clip_grad_norm_(twin.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            given += [monitor.on_step()] if monitor else []
        ends.append(weights(twin))
    monitor.close()
    assert same_bits(*ends)
    assert not monitor.errors
    return given


def test_scores_beyond_half_precision_are_named_as_scores_with_their_head():
    def plant(model, _):
        model[0].q.weight[HEAD_DIM : 2 * HEAD_DIM] *= 2e4
        model[0].k.weight[HEAD_DIM : 2 * HEAD_DIM] *= 2e1

    given = steps_on_floats(lambda: nn.Sequential(Overflows(), nn.Linear(32, 1)), plant)
    assert first_bad(given) == (3, "0", 1, "score")


def test_a_nan_in_the_batch_is_named_as_the_batch():
    def plant(_, x):
        x[1, 2, 3] = math.nan

    given = steps_on_floats(Floats, plant)
    assert first_bad(given) == (3, None, None, "argument 0")
    assert given[2].issues[0].evidence["detail"] == "1 NaN of 384"


class SquareRoot(nn.Module):
    """Takes a root of 0, which is finite, and has no finite gradient."""

    def forward(self, x: Tensor) -> Tensor:
        return x + (0 * x).sqrt()


class Rooted(Floats):
    """With a root in the middle."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.Sequential(nn.LayerNorm(32), SquareRoot())


@pytest.mark.parametrize(
    "loss_of", [lambda out: out.square().mean(), lambda out: (3 * out).logsumexp(-1).sum()]
)
def test_a_gradient_that_is_not_finite_is_traced_though_clipping_has_spread_it(loss_of):
    given = steps_on_floats(Rooted, lambda model, x: None, at=1, steps=3, loss_of=loss_of)
    step, layer, head, tensor = first_bad(given)
    assert (step, layer, head, tensor) == (1, "norm.1", None, "input.grad")


class BadHead(torch.autograd.Function):
    """Identity in whose backward one head of ``[B, H, Q, K]`` gets a NaN."""

    @staticmethod
    def forward(ctx, scores, head):
        ctx.head = head
        return scores.clone()

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone()
        gradient[0, ctx.head, 1, 1] = math.nan
        return gradient, None


class AttentionBadInBackward(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.qkv, self.o = nn.Linear(32, 96), nn.Linear(32, 32)

    def forward(self, x: Tensor) -> Tensor:
        query, key, value = (
            part.unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1)
        )
        scores = BadHead.apply(query @ key.transpose(-1, -2), 2)
        return self.o((scores.softmax(-1) @ value).transpose(1, 2).flatten(-2))


def test_the_head_is_named_where_backward_alone_is_bad():
    given = steps_on_floats(
        lambda: nn.Sequential(nn.Linear(32, 32), AttentionBadInBackward()),
        lambda model, x: None,
        at=1,
        steps=2,
    )
    assert first_bad(given) == (1, "1", 2, "qkv.output.grad")


def test_a_replay_runs_under_the_autocast_of_the_forward():
    """In bfloat16 the product overflows, in float32 it would not."""

    class Product(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(32, 32, bias=False)

        def forward(self, x):
            y = self.a(x)
            assert y.dtype == torch.bfloat16, "not under autocast"
            return y / (y == y.float().to(torch.bfloat16)).logical_not()

    model = Product()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer)
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(torch.randn(2, 3, 32)).float().sum()
    loss.backward()
    optimizer.step()
    diagnosis = monitor.on_step(loss)
    monitor.close()
    assert not monitor.errors
    assert (diagnosis.issues[0].layer, diagnosis.issues[0].evidence["tensor"]) == (
        "Product",
        "output",
    )


def test_a_bad_loss_of_a_finite_model_is_attributed_to_the_loss_function():
    given = steps_on_floats(
        Floats, lambda model, x: None, at=1, steps=2, loss_of=lambda out: (out * 0).sum().log()
    )
    (issue,) = given[0].issues
    assert issue.step == 1
    assert issue.evidence["kind"] in ("gradient", "loss")
    assert "nan" in str(issue.value)


def causes(given):
    """(step, severity, cause, touched) of each issue that opened or worsened."""
    issues = [issue for each in given if each for issue in each.issues if issue.state != "closed"]
    return [
        (issue.step, issue.severity, issue.evidence["cause"], issue.evidence["touched"])
        for issue in issues
    ]


def test_labels_that_are_all_ignored_touch_nothing_and_are_an_alarm_only_where_they_always_are():
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, config="guard")
    given = []
    for _ in range(17):
        loss = F.cross_entropy(model(torch.randn(2, 6, 32)), torch.full((2,), -100))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step(loss.detach()))
    monitor.close()
    assert causes(given) == [
        (1, "warning", "labels", "nothing"),
        (17, "error", "labels", "nothing"),
    ]
    assert not [issue for issue in monitor.issues if "Go back" in issue.suggestion]
    assert "every gradient was 0" in monitor.issues[1].suggestion
    assert [each.intervention.name for each in monitor.applied] == ["skip_step"]


def test_labels_that_are_all_ignored_are_reported_where_the_model_takes_them():
    model = gpt2()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer)
    (tokens,) = batches(1)
    model(
        tokens, labels=torch.where(torch.arange(12) < 1, tokens, -100)
    ).loss.backward()  # the first is shifted out
    optimizer.step()
    diagnosis = monitor.on_step()
    monitor.close()
    assert causes([diagnosis]) == [(1, "warning", "labels", "nothing")]
    assert diagnosis.issues[0].evidence["detail"] == "all 44 labels are below 0, which ignores them"


@pytest.mark.parametrize("log_every", [1, 4])
def test_a_reported_loss_without_gradients_is_no_reason_to_go_back(log_every):
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, config="guard", log_every=log_every)
    given = []
    for step in range(1, 13):
        loss = model(torch.randn(2, 6, 32)).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step(math.nan if step > 5 else loss.item()))
    monitor.close()
    assert causes(given) == [(6, "warning", "objective", "nothing")]
    assert [each.intervention.name for each in monitor.applied] == ["skip_step"]


def test_a_bad_loss_without_damage_does_not_hide_what_comes_after_it():
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer)
    given = []
    for step in range(1, 9):
        x = torch.randn(2, 6, 32)
        x[1, 2, 3] = math.nan if step == 5 else 0.0
        loss = model(x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step(math.nan if step > 1 else loss.detach()))
    monitor.close()
    assert causes(given) == [
        (2, "warning", "objective", "nothing"),
        (5, "critical", "data", "weights"),
    ]


def test_a_gradient_from_outside_the_model_is_critical_at_once_and_points_to_the_loss_function():
    def ratio(out):
        return (
            torch.exp(out + 200 * (out > out.median())).clamp(max=2) * (out <= out.median())
        ).sum()

    given = steps_on_floats(Floats, lambda model, x: None, at=1, steps=3, loss_of=ratio)
    assert causes(given) == [(1, "critical", "objective", "weights")]
    assert "loss function" in given[0].issues[0].suggestion


def test_a_gradient_that_guard_skips_corrupts_nothing_until_every_step_is_skipped():
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer, config="guard")
    given = []
    for _ in range(40):
        out = model(torch.randn(2, 6, 32))
        (out.square().mean() + (out - out.detach()).norm() * math.nan).backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step())
    monitor.close()
    said = [(1, "warning"), (17, "error"), (34, "critical")]
    assert causes(given) == [(step, severity, "objective", "gradients") for step, severity in said]
    assert [each.intervention.name for each in monitor.applied] == ["skip_step"]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


class Hides(nn.Module):
    """Attention by hand that adds its mask once or twice, and may put zeros where a softmax had
    nothing.
    """

    def __init__(self, times: int = 1, zeros: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.q, self.k, self.v, self.o = (nn.Linear(32, 32) for _ in range(4))
        self.times, self.zeros = times, zeros

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        query, key, value = (
            part(x).unflatten(-1, (HEADS, -1)).transpose(1, 2) for part in (self.q, self.k, self.v)
        )
        scores = query @ key.transpose(-1, -2) * HEAD_DIM**-0.5
        for _ in range(self.times):
            scores = scores + mask
        weights = scores.softmax(-1)
        weights = weights.nan_to_num(0.0) if self.zeros else weights
        return self.o((weights @ value).transpose(1, 2).flatten(-2))


class TorchsOwn(nn.Module):
    """``nn.MultiheadAttention`` with its weights returned."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.attention = nn.MultiheadAttention(32, HEADS, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        hidden = mask[:, 0, 0] != 0
        return (
            self.attention(x, x, x, key_padding_mask=hidden, need_weights=True)[0]
            * ~hidden[..., None]
        )


class Between(nn.Module):
    """A layer before and a layer after."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.first, self.inner, self.last = nn.Linear(32, 32), inner, nn.Linear(32, 4)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.last(x + self.inner(self.first(x), mask))


LEAST = torch.finfo(torch.float32).min


@pytest.mark.parametrize(
    ("inner", "value", "layer"),
    [
        (Hides, -math.inf, "inner.o"),
        (lambda: Hides(times=2), LEAST, "inner.o"),
        (lambda: Hides(zeros=True), -math.inf, "inner"),
        (TorchsOwn, -math.inf, "inner.attention"),
    ],
)
def test_rows_that_see_no_key_are_named_with_their_batch_entry(inner, value, layer):
    model = Between(inner())
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer)
    mask = torch.zeros(3, 1, 1, 6)
    mask[1] = value
    model(torch.randn(3, 6, 32), mask).square().mean().backward()
    optimizer.step()
    diagnosis = monitor.on_step()
    monitor.close()
    assert not monitor.errors
    assert causes([diagnosis]) == [(1, "critical", "mask", "weights")]
    assert diagnosis.issues[0].layer == layer
    assert "6 query rows (batch entries 1)" in diagnosis.issues[0].evidence["detail"]


def test_a_mask_that_is_not_finite_itself_is_the_cause():
    model = Between(Hides())
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer)
    model(torch.randn(3, 6, 32), torch.zeros(3, 1, 1, 6) * -math.inf).square().mean().backward()
    optimizer.step()
    diagnosis = monitor.on_step()
    monitor.close()
    assert causes([diagnosis]) == [(1, "critical", "mask", "weights")]


def test_rows_hidden_in_one_sequence_are_not_the_cause_of_a_nan_in_another():
    model = Between(Hides(zeros=True))
    model.inner.o.register_forward_pre_hook(
        lambda module, args: (args[0].index_fill(0, torch.tensor([2]), math.nan),)
    )
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer)
    mask = torch.zeros(3, 1, 1, 6)
    mask[1] = -math.inf
    model(torch.randn(3, 6, 32), mask).square().mean().backward()
    optimizer.step()
    diagnosis = monitor.on_step()
    monitor.close()
    assert causes([diagnosis]) == [(1, "critical", "arithmetic", "weights")]


def test_half_precision_that_overflows_is_named_as_that():
    model = Floats()
    optimizer = optimizer_of(model)
    monitor = watch(model, optimizer)
    with torch.autocast("cpu", torch.float16):
        loss = model(torch.randn(2, 6, 32) * 1e6).float().square().mean()
    loss.backward()
    optimizer.step()
    diagnosis = monitor.on_step(loss.detach())
    monitor.close()
    assert causes([diagnosis]) == [(1, "critical", "overflow", "weights")]


def sets_rate(rate):
    """An optimizer whose rate is ``rate`` at its third step, and back at 0.01 when somebody
    looks.
    """

    def make(model):
        optimizer, steps = torch.optim.SGD(model.parameters(), 0.01), iter(range(1, 100))

        def before(*_):
            optimizer.param_groups[0]["lr"] = rate if next(steps) == 3 else 0.01

        def after(*_):
            optimizer.param_groups[0]["lr"] = 0.01

        optimizer.register_step_pre_hook(before)
        optimizer.register_step_post_hook(after)
        return optimizer

    return make


@pytest.mark.parametrize("make", [sets_rate(math.inf), sets_rate(math.nan)])
def test_weights_that_the_optimizer_corrupts_are_found_at_the_next_step_and_rolled_back(make):
    model = Floats()
    optimizer = make(model)
    monitor = watch(model, optimizer, config="guard", log_every=2)
    given = []
    for _ in range(6):
        model(torch.randn(2, 6, 32)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step())
    monitor.close()
    assert causes(given)[0] == (4, "critical", "optimizer", "weights")
    assert "rollback" in [each.intervention.name for each in monitor.applied]
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_an_epsilon_of_nothing_is_named_where_a_gradient_is_zero():
    model = Floats()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3, eps=0.0)
    monitor = watch(model, optimizer)
    given = []
    for _ in range(2):
        model(torch.randn(2, 6, 32))[..., :3].square().mean().backward()  # the last logit is unused
        optimizer.step()
        optimizer.zero_grad()
        given.append(monitor.on_step())
    monitor.close()
    (issue,) = given[1].issues
    assert (issue.severity, issue.evidence["cause"]) == ("critical", "optimizer")
    assert "eps is 0" in issue.evidence["detail"]


def test_weights_corrupted_by_other_code_are_not_attributed_to_the_optimizer():
    def plant(model):
        model.transformer.h[1].mlp.c_fc.weight[0, 0] = math.nan

    given, _ = twins(gpt2, plant)
    assert causes(given) == [(3, "critical", "weights", "weights")]


def test_a_state_of_before_causes_were_stored_is_continued():
    model = Floats()
    monitor = watch(model, optimizer_of(model))
    state = monitor.state_dict()
    old = {
        "step": 4,
        "kind": "gradient",
        "layer": "head",
        "head": None,
        "tensor": "weight.grad",
        "detail": "1 NaN of 128",
    }
    monitor.load_state_dict(
        state | {"step": 5, "last_reading": 4, "non_finite": {"found": old, "last_bad": 5}}
    )
    assert monitor._parts.detector.found_since(4) == NonFinite(**old)
    assert monitor._parts.detector.state_dict()["found"] == asdict(NonFinite(**old))
    monitor.close()


def test_without_an_optimizer_the_loss_alone_is_evidence():
    model = Floats()
    monitor = watch(model, None)
    diagnosis = monitor.on_step(math.nan)
    monitor.close()
    assert diagnosis.issues[0].evidence["kind"] == "loss"
    assert diagnosis.issues[0].layer is None


def test_a_bad_step_shows_at_the_next_sample_if_not_every_step_is_watched():
    def plant(_, x):
        x[1, 2, 3] = math.nan

    given = steps_on_floats(Floats, plant, at=3, steps=8, log_every=4, watch_every_step=False)
    assert [bool(each) for each in given] == [False] * 3 + [True] + [False] * 3 + [True]
    assert "non_finite" in {issue.issue_type for issue in given[3].issues}


def test_inputs_beyond_the_memory_kept_for_replays_are_not_kept(monkeypatch):
    from stabmon._torch import forward_call as replay

    monkeypatch.setattr(replay, "_KEEP_BYTES", 2 * 6 * 32 * 4 * 2)
    model = Floats()
    monitor = watch(model, optimizer_of(model))
    for _ in range(5):
        model(torch.randn(2, 6, 32))
    assert monitor._observer.forwards.count == 5
    assert len(monitor._observer.forwards.calls) == 2
    monitor.close()


def test_minus_infinity_alone_hides_keys_and_is_no_finding():
    class Masks(nn.Module):
        def forward(self, x):
            return torch.full((6, 6), -torch.inf).triu(1)

    class Masked(nn.Module):
        def __init__(self):
            super().__init__()
            self.masks, self.attention, self.bad = Masks(), nn.Linear(32, 32), nn.Linear(32, 1)

        def forward(self, x):
            scores = self.attention(x) @ x.transpose(-1, -2) + self.masks(x)
            return self.bad(scores.softmax(-1) @ x)

    def plant(model, _):
        model.bad.weight[0, 3] = math.inf

    given = steps_on_floats(Masked, plant, at=2)
    assert first_bad(given) == (2, "bad", None, "weight")
