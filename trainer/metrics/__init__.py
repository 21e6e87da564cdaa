"""Metrics of images: streamed, and summable over ranks."""
