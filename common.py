"""What every file may stand on: random streams by name, and JSON that any reader takes. No torch in here.

    python -c "import common; print(common.derive('hands', 0), common.to_json({'loss': float('nan')}))"
"""

import hashlib
import json
import math

# Seeds of hands (and routes): evaluation counts from 0, training from somewhere in [TRAINING, 2**63).
TRAINING = 2**62


def derive(*keys):
    """Return a number in [0, 2**63) that depends on all keys (words and integers) and on their order.

    A hash rather than arithmetic: seed * 1_009 + turn is the same number for many pairs, grows beyond 64
    bits, and turns neighbours into neighbours.
    """
    text = "".join(f"{key}\0" for key in keys)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest()) >> 1


def averages(steps):
    """Average metrics over the steps of an update: {name: (mean of a step, how many it is a mean over)} each
    -> {name: mean over all of these}. An empty dict is a step that was not made; their number is
    "empty_minibatches"."""
    made = [metrics for metrics in steps if metrics]
    columns = {name: [metrics[name] for metrics in made] for name in (made[0] if made else ())}
    mean = lambda column: sum(x * n for x, n in column) / sum(n for _, n in column)
    means = {name: mean(column) for name, column in columns.items()}
    return means | {"empty_minibatches": len(steps) - len(made)}


def to_json(record, **how):
    """Write plain data as strict JSON text, as json.dumps(record, **how) does but for NaN and infinities:
    JSON has no such numbers, and null stands for them."""
    def finite(x):
        if isinstance(x, float):
            return x if math.isfinite(x) else None
        if isinstance(x, dict):
            return {key: finite(value) for key, value in x.items()}
        return [finite(value) for value in x] if isinstance(x, (list, tuple)) else x

    if "default" in how:                       # what it makes of an object may hold such numbers, too
        how["default"] = lambda x, plain=how["default"]: finite(plain(x))
    return json.dumps(finite(record), allow_nan=False, **how)
