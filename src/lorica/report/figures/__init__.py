"""One file for each figure: from subjects to panels, a table of what they show, and their words."""
