"""Sources to MDS shards."""
