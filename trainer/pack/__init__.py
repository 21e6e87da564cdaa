"""Pictures and captions → shards."""
