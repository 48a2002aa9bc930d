"""Checkpoints, read without running code in them."""

from sit_composer.checkpoint.load import load_checkpoint

__all__ = ["load_checkpoint"]
