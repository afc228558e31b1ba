"""Studies and sweeps: several runs, or many points of a merge, that answer one question."""
