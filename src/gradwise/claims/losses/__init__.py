"""Claims of the losses room."""
