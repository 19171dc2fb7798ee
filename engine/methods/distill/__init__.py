"""Methods that train the compressed model to agree with the dense one."""
