"""Metrics of images, computed from streamed batches on any number of ranks."""
