"""Write and read shards: tar files with an index and a manifest."""
