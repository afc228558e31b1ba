"""Training runs: set up, taken to their end, taken up again or replayed; and what each adapter.kind is to them."""
