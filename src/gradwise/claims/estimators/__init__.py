"""Claims of the estimators room."""
