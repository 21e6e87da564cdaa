"""The run folder: names, writers and readers of its files."""
