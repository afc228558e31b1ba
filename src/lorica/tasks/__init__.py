"""What to learn, and how to ask it."""
