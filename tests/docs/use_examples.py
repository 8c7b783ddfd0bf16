"""Use the package of ``docs/examples`` as one that is installed; run by ``test_examples.py``."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from stabmon import AttentionStabilityMonitor, StabilityConfig
from stabmon.cli import app
from stabmon.controllers import attach_controllers, detach_controllers

HEADS, WIDTH, LENGTH = 2, 16, 32


class Attention(nn.Module):
    """Attention whose queries are all zero at first, so that every row is uniform."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        nn.init.zeros_(self.query.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        query, key, value = (
            each(hidden).unflatten(-1, (HEADS, -1)).transpose(1, 2)
            for each in (self.query, self.key, self.value)
        )
        return F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)


def watched(run_dir: Path) -> tuple[nn.Module, torch.optim.Optimizer, AttentionStabilityMonitor]:
    """Return a model with its optimizer, and a monitor that uses every leaf of the package."""
    torch.manual_seed(0)
    model = Attention()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, weight_decay=0.3)
    config = StabilityConfig(
        log_every=1,
        signals=["normalized_entropy", "max_logit", "score_range"],
        rules={"uniform_attention": {"readings": 2}},
        interventions={"pause_weight_decay": {}},
        sinks=["jsonl", "csv"],
    )
    return (
        model,
        optimizer,
        AttentionStabilityMonitor(model, optimizer, config=config, run_dir=run_dir),
    )


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    monitor: AttentionStabilityMonitor,
    steps: int,
) -> None:
    """Train on noise."""
    for _ in range(steps):
        loss = model(torch.randn(2, LENGTH, WIDTH)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        diagnosis = monitor.on_step(loss)
        assert diagnosis is not None
        assert diagnosis.stats[next(iter(diagnosis.stats))]["score_range"].shape == (HEADS,)


def use_in_training(folder: Path) -> None:
    """Watch a run: the signal is measured, the rule alarms, the intervention is applied and undone,
    the sink writes, and a resumed run holds what was held.
    """
    model, optimizer, monitor = watched(folder / "first")
    train(model, optimizer, monitor, 3)
    assert {issue.issue_type for issue in monitor.issues} == {"uniform_attention"}, monitor.issues
    assert [each.intervention.name for each in monitor.applied] == ["pause_weight_decay"]
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert not monitor.errors, monitor.errors
    written = (folder / "first" / "stabmon" / "issues.csv").read_text().splitlines()
    assert len(written) == HEADS, written
    assert "opened,error,uniform_attention" in written[0]
    state, optimizer_state = monitor.state_dict(), optimizer.state_dict()

    model, optimizer, resumed = watched(folder / "second")
    optimizer.load_state_dict(optimizer_state)
    resumed.load_state_dict(state)
    assert optimizer.param_groups[0]["weight_decay"] == 0.0
    assert resumed.applied[0].undo()
    assert optimizer.param_groups[0]["weight_decay"] == 0.3
    resumed.close()
    monitor.close()


def use_controller() -> None:
    """Attach the controller: nothing changes at first, and its weight changes the output."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    shape = GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=32, n_positions=32)
    model = GPT2LMHeadModel(shape).eval()
    tokens = torch.arange(16)[None]
    with torch.no_grad():
        before = model(tokens).logits
        controllers = attach_controllers(model, "token_bias")
        assert torch.allclose(model(tokens).logits, before, atol=1e-5)
        for parameter in controllers.parameters():
            parameter.normal_()
        assert not torch.allclose(model(tokens).logits, before, atol=1e-3)
        detach_controllers(model)
        assert torch.equal(model(tokens).logits, before)


def main() -> None:
    """List and use every leaf; the first argument is a folder to write to."""
    app(["list", "--json"], standalone_mode=False)
    use_in_training(Path(sys.argv[1]))
    use_controller()
    print("all leaves work")


if __name__ == "__main__":
    main()
