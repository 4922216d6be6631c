"""What stands under model.py: Hugging Face folders, sizes, images and chat."""
