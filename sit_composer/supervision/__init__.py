"""What keeps a run alive, and alone."""
