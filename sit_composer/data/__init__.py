"""MDS shards, streamed and checked."""
