"""Claims of the optim room."""
