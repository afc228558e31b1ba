"""Merges: settled as the config says, learned, judged on their adapters' own tasks, and written."""
