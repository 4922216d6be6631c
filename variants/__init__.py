"""Variants of the algorithms, a file each, beside what the paper does."""
