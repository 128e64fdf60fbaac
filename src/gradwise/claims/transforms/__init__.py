"""Claims of the transforms room."""
