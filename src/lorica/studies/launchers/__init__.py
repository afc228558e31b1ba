"""One file for each launcher; the file's name is the launcher's. `studies/launcher.py` says what a file holds."""
