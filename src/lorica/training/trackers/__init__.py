"""One file for each tracker; the file's name is the tracker's. `training/tracker.py` says what a file holds."""
