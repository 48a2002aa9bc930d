"""What is kept of an image."""
