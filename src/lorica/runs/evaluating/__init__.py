"""Evaluations: what is evaluated and what it is asked, one target on one task or many as a matrix."""
