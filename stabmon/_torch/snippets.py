"""Lines of torch code that advice to users shows."""

QK_NORM = (
    "q, k = F.rms_norm(q, q.shape[-1:], q_gain), F.rms_norm(k, k.shape[-1:], k_gain)  "
    "# in the attention's forward, before scores"
)
"""Normalise queries and keys."""
