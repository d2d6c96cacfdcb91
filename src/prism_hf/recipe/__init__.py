"""A recipe: its sections and ranges, its YAML, its plan. No torch."""
