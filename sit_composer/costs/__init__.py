"""Memory and time, estimated."""
