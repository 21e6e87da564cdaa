"""Read images and latents from shards, and make batches of them."""
