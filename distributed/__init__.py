"""What several processes need beyond one: shard.py cuts the model into slices. None of it is in model.py."""
