"""Lines of torch code in advice to users."""

QK_NORM = (
    "q, k = F.rms_norm(q, q.shape[-1:], q_gain), F.rms_norm(k, k.shape[-1:], k_gain)  "
    "# in the attention's forward, before scores"
)
"""Normalisation of queries and keys."""
