"""What the two games of envs.py stand on: prompts, the solver, the reader of answers, the verifier."""
