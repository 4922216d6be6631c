"""Sizes, Hugging Face folders, chat and images, KV cache, generation, batches: all around model.py."""
