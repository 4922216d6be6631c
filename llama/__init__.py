"""What stands under model.py: sizes, Hugging Face folders, chat and images, KV cache, generation, batches."""
