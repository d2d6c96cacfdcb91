"""Runs: the output folder, the stages, and the intermediate files that the stages exchange."""
