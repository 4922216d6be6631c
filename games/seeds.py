"""Derive random streams by name, so that no two coincide.

    python -c "from games import seeds; print(seeds.derive('hands', 0))"
"""
import hashlib

# Seeds of hands and routes: evaluation counts from 0, training from somewhere in [TRAINING, 2**63).
TRAINING = 2**62


def derive(*keys):
    """Return a number in [0, 2**63) that depends on all keys (words and integers) and on their order.

    A hash rather than arithmetic: seed * 1_009 + turn is the same number for many pairs, grows beyond 64
    bits, and turns neighbours into neighbours."""
    text = "".join(f"{key}\0" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1
