"""Give the layers and heads of all ranks names that each rank agrees on."""
