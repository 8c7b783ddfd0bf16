"""Time series of what controllers do: their numbers, their files, and that they disturb nothing."""

from typing import Any

import numpy as np
import pytest
import torch

from stabmon.controllers import ControllerWatch, attach_controllers
from stabmon.sinks.reader import read_records
from tests.controllers.test_families import CASES
from tests.support.attention_zoo import gpt_oss, tokens, zoo
from tests.support.controlled_attention import built, dense_output, output_of, scatter
from tests.support.small_runs import batches, gpt2, optimizer_of, same_bits, train, weights


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("family", ["gpt2-sdpa", "llama-eager"])
@torch.no_grad()
def test_numbers_are_those_of_weights_written_out(family: str, case: str) -> None:
    kind, options = CASES[case]
    model, inputs, controllers = built(family, kind, **options)
    modified: list[torch.Tensor] = []
    dense_output(model, inputs, modified)
    original = [originals(model, inputs, layer) for layer in range(2)]
    with ControllerWatch(model, sinks=[]) as watch:
        output_of(model, inputs)
    assert watch.errors == []
    (reading,) = watch.readings
    for place, (found, p, q, member) in enumerate(
        zip(reading.layers.values(), original, modified, controllers.values(), strict=True)
    ):
        kl = torch.special.xlogy(p, p / q.where(q > 0, 1.0)).sum(-1).mean(dim=(0, 2))
        np.testing.assert_allclose(found["controller_kl"], kl, atol=2e-4, err_msg=str(place))
        assert found["controller_kl"].max() > 1e-3
        np.testing.assert_allclose(
            found["attention_entropy"], torch.special.entr(q).sum(-1).mean(dim=(0, 2)), atol=1e-4
        )
        visible = p > 0
        n = visible.sum(-1)
        spread = ((q - 1 / n[..., None]).square() * visible).sum(-1) / n
        np.testing.assert_allclose(found["attention_variance"], spread.mean(dim=(0, 2)), atol=1e-5)
        share = member.linear_share()
        np.testing.assert_allclose(
            found["linear_share"],
            torch.as_tensor(0.0 if share is None else share).expand(4),
            atol=1e-6,
        )


def originals(model: Any, inputs: dict[str, Any], layer: int) -> torch.Tensor:
    """The weights of one layer on what it is given in the controlled model, had it no
    controller.
    """
    import copy

    from stabmon.controllers import detach_controllers

    twin = copy.deepcopy(model)
    twin.set_attn_implementation("eager")
    name = [n for n, m in twin.named_modules() if "stabmon_controller" in m._modules][layer]
    call: list[Any] = []
    handle = twin.get_submodule(name).register_forward_pre_hook(
        lambda m, a, k: call.append((a, k)), with_kwargs=True, prepend=True
    )
    output_of(twin, inputs)
    handle.remove()
    detach_controllers(twin)
    args, kwargs = call[0]
    found: torch.Tensor = twin.get_submodule(name)(*args, **kwargs)[1]
    return found


@torch.no_grad()
def test_learned_sinks_count_in_the_divergence() -> None:
    model, inputs = gpt_oss("eager")
    scatter(attach_controllers(model.eval(), form="both"))
    with ControllerWatch(model, sinks=[]) as watch:
        output_of(model, inputs)
    assert watch.errors == []
    assert all(
        (found["controller_kl"] > 0).all() and (found["controller_kl"] < 5).all()
        for found in watch.readings[0].layers.values()
    )


@torch.no_grad()
def test_what_has_learned_nothing_has_not_moved() -> None:
    model, inputs = zoo()["llama-sdpa"]()
    attach_controllers(model.eval(), form="both")
    with ControllerWatch(model, sinks=[]) as watch:
        output_of(model, inputs)
    for found in watch.readings[0].layers.values():
        assert np.abs(found["controller_kl"]).max() < 1e-6
        assert (found["mean_adjustment"] == 0).all()
        assert (found["query_gain"] == 1).all()


@torch.no_grad()
def test_generation_is_a_series_of_tokens_in_files_and_pictures(tmp_path: Any) -> None:
    model, _, _ = built("gpt2-sdpa", form="both")
    options = {"max_new_tokens": 9, "do_sample": False, "eos_token_id": None, "use_cache": True}
    plain = model.generate(**tokens(6), **options)
    with ControllerWatch(model, every=2, run_dir=tmp_path) as watch:
        watched = model.generate(**tokens(6), **options)
    assert torch.equal(plain, watched)
    assert [reading.step for reading in watch.readings] == [1, 3, 5, 7, 9]
    records = read_records(tmp_path)
    assert len(records.readings) == 5
    assert records.readings[2].layers["transformer.h.1.attn"]["controller_kl"].shape == (4,)
    watch.plot_grid("controller_kl", tmp_path / "grid.png")
    watch.plot_series(tmp_path / "series.png")
    assert all((tmp_path / name).stat().st_size > 5000 for name in ("grid.png", "series.png"))
    with pytest.raises(ValueError, match="no reading has 'nonesuch'"):
        watch.plot_grid("nonesuch")


@pytest.mark.parametrize("case", ["both", "learned_ramp"])
def test_watching_changes_not_a_bit_of_training(case: str) -> None:
    kind, options = CASES[case]
    found = []
    for watched in (False, True):
        model = gpt2()
        scatter(attach_controllers(model, kind, **options))
        if watched:
            with ControllerWatch(model, sinks=[]) as watch:
                train(model, None, optimizer_of(model), batches(3))
            assert watch.errors == []
            assert [reading.loss is not None for reading in watch.readings] == [True] * 3
            assert all(member.listener is None for member in watch._members.values())
        else:
            train(model, None, optimizer_of(model), batches(3))
        found.append(weights(model))
    assert same_bits(*found)


def test_what_fails_inside_does_not_reach_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    model, inputs, _ = built("gpt2-sdpa")
    monkeypatch.setattr("stabmon.controllers.watch.row_means", lambda *given: 1 / 0)
    with ControllerWatch(model, sinks=[]) as watch:
        output_of(model, inputs)
    assert len(watch.errors) == 2
    assert watch.readings == []


def test_a_model_without_controllers_is_refused() -> None:
    with pytest.raises(ValueError, match="attach_controllers"):
        ControllerWatch(zoo()["gpt2-sdpa"]()[0])
