"""One file for each merge method; the file's name is the method's. `merging/method.py` says what a file holds."""
