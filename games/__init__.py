"""What the two games of envs.py use: solver, parser, verifier; routes, cards, cities and pictures."""
