"""Controllers train under the Trainer, Lightning, Accelerate and beside PEFT, watched by the same
callback.
"""

from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from stabmon.controllers import (
    attach_controllers,
    detach_controllers,
    load_controllers,
    save_controllers,
)
from tests.support.small_runs import Tokens, gpt2, llama


def moved(controllers: nn.Module) -> bool:
    """Whether every parameter has left 0."""
    return all(bool((parameter != 0).any()) for parameter in controllers.parameters())


@pytest.mark.parametrize("frozen", [True, False])
def test_the_trainer_trains_saves_and_resumes_them_under_watch(frozen: bool, tmp_path: Any) -> None:
    from transformers import Trainer, TrainingArguments

    from stabmon.integrations.transformers import StabilityCallback

    def trainer(steps: int) -> tuple[Any, Any, Any]:
        model = llama()
        model.requires_grad_(not frozen)
        controllers = attach_controllers(model, form="both")
        args = TrainingArguments(
            str(tmp_path),
            max_steps=steps,
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            save_steps=3,
            report_to="none",
            logging_steps=1,
            disable_tqdm=True,
            use_cpu=True,
            gradient_checkpointing=True,
            save_total_limit=3,
        )
        callback = StabilityCallback("observe", log_every=1, sinks=[])
        return (
            Trainer(model, args, train_dataset=Tokens(), callbacks=[callback]),
            controllers,
            callback,
        )

    first, controllers, callback = trainer(6)
    base = {
        name: value.clone()
        for name, value in first.model.named_parameters()
        if "stabmon" not in name
    }
    first.train()
    assert moved(controllers)
    assert not callback.monitor.errors
    assert frozen == all(
        torch.equal(base[name], value)
        for name, value in first.model.named_parameters()
        if name in base
    )
    again, resumed, _ = trainer(6)
    again.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for one, other in zip(controllers.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, atol=1e-6, rtol=1e-4)


def test_lightning_trains_them_under_watch(tmp_path: Any) -> None:
    import lightning as L

    from stabmon.integrations.lightning import StabilityCallback

    class Module(L.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = gpt2()
            self.controllers = attach_controllers(self.model, form="both")

        def training_step(self, batch: Any, index: int) -> Any:
            return self.model(**batch).loss

        def configure_optimizers(self) -> Any:
            return torch.optim.Adam(self.controllers.parameters(), 1e-2)

    module, callback = Module(), StabilityCallback("observe", log_every=1, sinks=[])
    trainer = L.Trainer(
        max_steps=3,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[callback],
        default_root_dir=tmp_path,
    )
    trainer.fit(module, DataLoader(Tokens(), 4))
    assert moved(module.controllers)
    assert not callback.monitor.errors


def test_accelerate_trains_them(tmp_path: Any) -> None:
    from accelerate import Accelerator

    model = llama()
    controllers = attach_controllers(model, form="key_bias")
    accelerator = Accelerator(cpu=True)
    optimizer = torch.optim.Adam(controllers.parameters(), 1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, DataLoader(Tokens(), 4))
    for batch in loader:
        accelerator.backward(model(**batch).loss)
        optimizer.step()
        optimizer.zero_grad()
    assert moved(controllers)
    save_controllers(controllers, tmp_path)


@pytest.mark.parametrize("first", ["controllers", "adapter"])
def test_they_live_beside_an_adapter(first: str, tmp_path: Any) -> None:
    import peft

    model = llama()
    config = peft.LoraConfig(r=2, target_modules="all-linear", task_type="CAUSAL_LM")
    if first == "controllers":
        controllers = attach_controllers(model, form="both")
        wrapped = peft.get_peft_model(model, config)
        controllers.requires_grad_(True)
    else:
        wrapped = peft.get_peft_model(model, config)
        controllers = attach_controllers(wrapped, form="both")
    assert list(controllers) == ["model/layers/0/self_attn", "model/layers/1/self_attn"]
    assert not any("lora" in name for name, _ in controllers.named_parameters())
    batch = torch.arange(24).view(2, 12)
    optimizer = torch.optim.Adam([p for p in wrapped.parameters() if p.requires_grad], 1e-2)
    for _ in range(2):
        wrapped(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert moved(controllers)
    expected = wrapped.eval()(input_ids=batch).logits
    save_controllers(wrapped, tmp_path)
    detach_controllers(wrapped)
    load_controllers(wrapped, tmp_path)
    assert torch.equal(wrapped(input_ids=batch).logits, expected)
