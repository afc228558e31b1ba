"""One file for each transform of an adapter's updates before the merge; the file's name is the transform's."""
