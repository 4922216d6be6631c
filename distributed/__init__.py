"""What several processes need beyond one: shard.py cuts the model into slices, plan.py says what fits. None of it is in model.py."""
