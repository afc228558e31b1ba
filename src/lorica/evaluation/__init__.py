"""How well a model with or without an adapter does on a task."""
