"""Methods that store something once for several places."""
