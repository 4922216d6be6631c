"""Measure what this project gains; nobody but their tests imports these.

    python -m benchmarks.kernels             # attention and log-probs next to all that could stand in their place (rivals.py)
    python -m benchmarks.generate            # sampling next to transformers
    python -m benchmarks.scenes              # cities and views
    python -m benchmarks.soak --minutes 30   # two ranks, one of which is killed every minute or so
"""
