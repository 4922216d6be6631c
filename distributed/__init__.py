"""Several processes: who they are, one model in slices over them (FSDP2), and checkpoints. model.py knows
nothing of it."""
