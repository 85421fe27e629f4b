"""Samples completions and rewards them."""
