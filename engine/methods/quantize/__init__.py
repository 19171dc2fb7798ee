"""Methods that give weights fewer bits."""
