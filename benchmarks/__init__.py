"""Measure the parts of this project against the clock. Only tests import it.

    python -m benchmarks.kernels               attention and log-probs, next to all their rivals (rivals.py)
    python -m benchmarks.generate              sampling, next to transformers
"""

import harness  # noqa: F401, before torch: see there
