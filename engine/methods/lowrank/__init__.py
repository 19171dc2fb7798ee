"""Methods that store a matrix as a product of two thin ones."""
