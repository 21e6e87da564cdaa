"""Bytes in, batches out: shards, manifests, the lane plan and the streams."""
