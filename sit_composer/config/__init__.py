"""A run's YAML: keys, values, and what they must fit."""
