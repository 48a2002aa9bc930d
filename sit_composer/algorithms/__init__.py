"""Composer algorithms."""
