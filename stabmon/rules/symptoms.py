"""Symptoms: the failure modes that rules report and interventions treat.

A rule declares the symptom of its issues, an intervention the symptoms that it treats; neither
knows the other by name. A rule of another package may declare one of these, or its own.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from stabmon._torch.snippets import QK_NORM


@dataclass(frozen=True)
class Symptom:
    """A failure mode, and the order of its treatment beside others.

    Example:
        >>> DEAD_HEADS = Symptom("dead_heads", "prune the head, or initialise it again", order=60)
        >>> DEAD_HEADS.per_location
        True
    """

    name: str
    """Name, as interventions declare it in ``treats``."""
    advice: str
    """Advice to a person once no intervention is left."""
    order: int = 35
    """Rank in which symptoms are treated, the smallest first."""
    per_location: bool = True
    """Treated and judged for each layer and head; else for the run as a whole."""
    exclusive: bool = False
    """Nothing else is done while one of its treatments has not been judged."""
    threatens_run: bool = False
    """No state of the run is kept as healthy while it is open, whatever its severity."""
    causal_order: int = 60
    """Place in the chain from causes to effects, causes first; unlike the order of treatment."""
    explains_earlier: bool = False
    """It was at work before it was found, and so explains what opened earlier."""
    passes_on: Literal["always", "idle", "never"] = "always"
    """Condition under which later symptoms are treated at the same sample.

    Always; unless a treatment of this one has not been judged yet (idle); or never, since they are
    likely to follow from this one.
    """
    passes_on_beside: tuple[str, ...] = ()
    """Symptoms beside which it passes on in any case."""
    waits_for: tuple[str, ...] = ()
    """Symptoms whose treatments must be judged first.

    Unless another symptom promotes this one.
    """
    promotes: tuple[str, ...] = ()
    """Symptoms to be treated right after this one where both are open."""


NON_FINITE = Symptom(
    "non_finite",
    "find the first bad tensor in issues.jsonl (evidence.first_bad), mend it, and start from a "
    "checkpoint before it",
    order=0,
    per_location=False,
    exclusive=True,
    threatens_run=True,
    passes_on="never",
    causal_order=45,
)
"""NaN or inf in the loss, the gradients, the weights or the activations."""
RATE = Symptom(
    "rate",
    "look at the schedule and the parameter groups around the step, and start from a checkpoint "
    "before it",
    order=10,
    per_location=False,
    threatens_run=True,
    # all weights have moved: the loss comes before the scores, and is gone back from
    promotes=("loss",),
    causal_order=10,
    explains_earlier=True,
)
"""Learning rate too high for the whole model or for a parameter group."""
DECAY = Symptom(
    "decay",
    "look at what sets the weight decay of the parameter groups, and start from a checkpoint before "
    "the step",
    order=11,
    per_location=False,
    threatens_run=True,
    causal_order=11,
    explains_earlier=True,
)
"""Weight decay that takes more of the weights than training can make up for."""
SUSTAINED_GROWTH = Symptom(
    "sustained_growth",
    "look for what multiplies the layer's W_q and W_k, or the scale of its scores",
    order=20,
    causal_order=20,
    explains_earlier=True,
)
"""Growth of a layer's scores by something other than learning."""
SCORES = Symptom(
    "scores",
    f"change the architecture so that scores cannot grow: {QK_NORM}",
    order=30,
    passes_on="never",
    passes_on_beside=("step",),
    causal_order=40,
)
"""Scores, or their entropy, far from the head's own past."""
STEP = Symptom(
    "step",
    "look at the rate of the parameter group that queries and keys are in",
    order=40,
    threatens_run=True,
    passes_on="never",
    causal_order=30,
)
"""Steps too long for one layer's queries and keys."""
LOSS = Symptom(
    "loss",
    "look at the batches around the spike, and start from a checkpoint before it with a lower rate "
    "or tighter clipping",
    order=50,
    per_location=False,
    threatens_run=True,
    passes_on="idle",
    waits_for=("sustained_growth",),
    causal_order=50,
)
"""Loss or gradient norm above its recent course."""
