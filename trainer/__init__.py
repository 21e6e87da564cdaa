"""Runs: the only package that knows both the models and the data."""
