"""Run folder → one HTML page."""
