"""Sizes, Hugging Face folders, chat and images, KV cache, generation, batches: the folder under model.py."""
