"""Samples of a checkpoint → metrics; sweeps."""
