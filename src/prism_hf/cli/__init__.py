"""The command line: one file per command, combined in `main`."""
