"""How the coefficients of a merge are fitted to its tasks."""
