"""The loop that trains, and what is written while it runs."""
