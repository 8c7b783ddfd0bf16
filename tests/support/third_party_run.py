"""Train a small model under guard with the leaves of another package; print the facts as JSON."""

import contextlib
import io
import json
import sys
from pathlib import Path

import torch

import stabmon
from stabmon.analysis.kv_cache import simulate_cache
from stabmon.cli import main as command_line
from stabmon.controllers import attach_controllers, detach_controllers
from tests.support.small_runs import batches, gpt2, optimizer_of, train, weights

LAYER, FAULT = "transformer.h.0.attn", 3
"""The layer whose queries and keys grow, and the step before which they do."""


def watched(model, optimizer, folder):
    """Return a monitor with every default and the other package's leaves beside."""
    signals = [*stabmon.load_config().signals, "peak_share"]
    return stabmon.AttentionStabilityMonitor(
        model,
        optimizer,
        run_dir=folder,
        log_every=1,
        signals=signals,
        sinks=["jsonl", "tally"],
        interventions={"flatten": {}},
    )


def break_layer(model):
    def between(step):
        if step == FAULT:
            with torch.no_grad():
                model.transformer.h[0].attn.c_attn.weight[:, :64] *= 64

    return between


def queries(model):
    return weights(model)["transformer.h.0.attn.c_attn.weight"][:, :32]


def main(folder: Path) -> dict[str, object]:
    sys.argv = ["stabmon", "list", "--json"]
    with contextlib.redirect_stdout(io.StringIO()) as listed:
        try:
            command_line()
        except SystemExit as ended:
            status = ended.code
    facts = {"status": status, "listed": json.loads(listed.getvalue())}

    model = gpt2(attn_implementation="sdpa")
    optimizer = optimizer_of(model, 1e-4)
    with watched(model, optimizer, folder) as monitor:
        train(model, monitor, optimizer, batches(FAULT + 3), between=break_layer(model))
        facts["applied"] = [
            [each.intervention.name, each.step, each.active] for each in monitor.applied
        ]
        facts["issues"] = [[each.step, each.issue_type, each.layer] for each in monitor.issues]
        facts["errors"] = dict(monitor.errors)
        state = json.loads(json.dumps(monitor.state_dict()))
        kept, before = weights(model), queries(model)
        facts["exact"] = monitor.applied[0].undo()
        facts["undone"] = torch.equal(queries(model), before * 2.0**12)

    resumed = gpt2(attn_implementation="sdpa")
    resumed.load_state_dict(kept, strict=False)
    optimizer = optimizer_of(resumed, 1e-4)
    with watched(resumed, optimizer, folder / "resumed") as monitor:
        monitor.load_state_dict(state)
        facts["resumed"] = [
            [each.intervention.name, each.step, each.active] for each in monitor.applied
        ]
        train(resumed, monitor, optimizer, batches(2))
        before = queries(resumed)
        monitor.applied[0].undo()
        facts["undone_after_resume"] = torch.equal(queries(resumed), before * 2.0**12)
        facts["resumed_errors"] = dict(monitor.errors)

    tokens = batches(1)[0]
    plain = resumed(input_ids=tokens).logits
    attach_controllers(resumed, "steady")
    facts["controlled"] = not torch.allclose(plain, resumed(input_ids=tokens).logits)
    detach_controllers(resumed)
    report = simulate_cache(resumed.eval(), tokens, policy="oldest", cache_size=8, window_size=2)
    facts["policy"] = report.policy
    return facts


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
