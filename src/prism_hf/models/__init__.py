"""Networks: teachers by name, training, squeezing, the folder of a shared network."""
