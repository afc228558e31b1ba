"""Where gradients come from, and what is done with them."""
