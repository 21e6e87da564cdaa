"""Image shards → latent shards."""
