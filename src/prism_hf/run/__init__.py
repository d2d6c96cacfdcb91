"""A run: its folder, what its stages leave, and the stages."""
