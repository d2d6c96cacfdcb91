"""How good a dataset is: students, similarity, the honest table."""
