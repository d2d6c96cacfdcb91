"""The science: one file per idea of docs/method.md."""
