"""Adapters inspected and verified: what they are made of, and whether named checks hold of them."""
