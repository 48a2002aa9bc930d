"""Checkpoints, read without running code in them."""
