"""Lines of code that follow an advice, in the terms of each framework."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

Framework = Literal["transformers", "lightning", "loop"]
FRAMEWORKS: tuple[Framework, ...] = ("transformers", "lightning", "loop")


def _pick(framework: str, transformers: str, lightning: str, loop: str) -> str:
    return {"transformers": transformers, "lightning": lightning}.get(framework, loop)


def set_rate(framework: str, rate: float) -> str:
    """Return the line that sets the learning rate of the whole run.

    Args:
        framework: ``transformers``, ``lightning`` or ``loop``.
        rate: the learning rate.

    Example:
        >>> set_rate("transformers", 0.00123)
        'TrainingArguments(learning_rate=0.0012, ...)'
    """
    return _pick(
        framework,
        f"TrainingArguments(learning_rate={rate:.2g}, ...)",
        f"torch.optim.AdamW(self.parameters(), lr={rate:.2g})  # in configure_optimizers",
        f'for group in optimizer.param_groups: group["lr"] = {rate:.2g}',
    )


def set_group_rates(framework: str, rates: Mapping[str, float]) -> str:
    """Return the lines that set the rates of some parameter groups.

    Args:
        framework: ``transformers``, ``lightning`` or ``loop``.
        rates: rate by ``<optimizer>.<group>``, both counted from 0.
    """
    name = _pick(framework, "trainer.optimizer", "trainer.optimizers[{}]", "optimizer")
    lines = []
    for key, rate in sorted(rates.items()):
        optimizer, _, group = key.partition(".")
        holder = name.format(optimizer) if "{}" in name else name
        lines.append(f'{holder}.param_groups[{group or 0}]["lr"] = {rate:.2g}')
    return "\n".join(lines)


def clip_gradients(framework: str, norm: float) -> str:
    """Return the line that clips the norm of the gradient.

    Args:
        framework: ``transformers``, ``lightning`` or ``loop``.
        norm: largest norm to let through.
    """
    return _pick(
        framework,
        f"TrainingArguments(max_grad_norm={norm:.2g}, ...)",
        f"Trainer(gradient_clip_val={norm:.2g}, ...)",
        f"torch.nn.utils.clip_grad_norm_(model.parameters(), {norm:.2g})"
        "  # before optimizer.step()",
    )


def run_in_bfloat16(framework: str) -> str:
    """Return the line that trains in bfloat16 instead of float16.

    Args:
        framework: ``transformers``, ``lightning`` or ``loop``.
    """
    return _pick(
        framework,
        "TrainingArguments(bf16=True, fp16=False, ...)",
        'Trainer(precision="bf16-mixed", ...)',
        "with torch.autocast(device_type, dtype=torch.bfloat16): ...",
    )


def guard(framework: str, *names: str) -> str:
    """Return the line that lets stabmon apply some interventions by itself.

    Args:
        framework: ``transformers``, ``lightning`` or ``loop``.
        names: interventions; none for those of the preset ``guard``.
    """
    chosen = ", ".join(f'"{name}": {{}}' for name in names)
    more = f", interventions={{{chosen}}}" if names else ""
    monitor = f'stabmon.AttentionStabilityMonitor(model, optimizer, config="guard"{more})'
    callback = f'StabilityCallback("guard"{more})'
    return _pick(framework, callback, callback, monitor)


def resume(framework: str, step: int) -> str:
    """Return the line that resumes from a checkpoint before a step.

    Args:
        framework: ``transformers``, ``lightning`` or ``loop``.
        step: optimizer step at which the run went wrong.
    """
    return _pick(
        framework,
        f'trainer.train(resume_from_checkpoint="<output_dir>/checkpoint-N")  # N < {step}',
        f'trainer.fit(model, ckpt_path="<checkpoint of a step before {step}>")',
        f'model.load_state_dict(torch.load("<checkpoint of a step before {step}>"))',
    )
