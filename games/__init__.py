"""What the two games of envs.py stand on: the solver, the reader of answers and the verifier."""
