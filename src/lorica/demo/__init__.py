"""The embedded default: a tiny base model and four tiny tasks, made by this project."""
