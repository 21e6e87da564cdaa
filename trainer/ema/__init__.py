"""Snapshots of averages → an average of any width."""
