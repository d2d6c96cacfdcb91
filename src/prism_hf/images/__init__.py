"""Pixels, views, and the real images of a dataset."""
