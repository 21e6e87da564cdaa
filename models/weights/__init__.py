"""Weights from files and from other projects' formats."""
