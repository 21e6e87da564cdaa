"""Decide the order of the training samples."""
