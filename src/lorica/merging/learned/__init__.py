"""Learners of merging coefficients, one file each; `merging/fitting/loading.py` states what a file holds."""
