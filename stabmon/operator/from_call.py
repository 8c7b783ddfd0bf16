"""The operator of a captured attention call."""

from __future__ import annotations

from stabmon.operator import AttentionOperator, attention_operator, operator_of_scores
from stabmon.records import AttentionCall


def operator_of(call: AttentionCall, engine: str = "auto") -> AttentionOperator:
    """Return the operator of a captured call.

    Args:
        call: a call with query and key, or with scores.
        engine: see :func:`stabmon.operator.attention_operator`.

    Raises:
        ValueError: for a call with neither, or with inputs that do not fit each other.

    Example:
        >>> import torch
        >>> query = torch.zeros(1, 2, 4, 8)
        >>> call = AttentionCall("h.0.attn", query, query, scale=8**-0.5, is_causal=True)
        >>> operator_of(call).n_visible()[0, 0]
        tensor([1, 2, 3, 4])
    """
    if call.query is not None and call.key is not None:
        operator = attention_operator(
            call.query,
            call.key,
            scale=call.scale,
            is_causal=call.is_causal,
            mask=call.mask,
            window=call.window,
            softcap=call.softcap,
            sinks=call.sinks,
            is_self=call.is_self,
            engine=engine,
        )
    elif call.scores is not None:
        operator = operator_of_scores(
            call.scores, softcap=call.softcap, sinks=call.sinks, is_self=call.is_self, engine=engine
        )
    else:
        raise ValueError(
            f"the call of {call.layer} holds neither query and key nor scores: give either"
        )
    operator.exp_range = call.exp_range
    return operator
