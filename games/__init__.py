"""What the two games of envs.py stand on: solver, reader and verifier, rails, cards, cities and their
pictures."""
