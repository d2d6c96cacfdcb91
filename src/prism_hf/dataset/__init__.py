"""The format of a distilled dataset: tables, provenance, reading, checking, export."""
