"""Data sets as they are published: where their images are, and how an image becomes a square of one size."""
