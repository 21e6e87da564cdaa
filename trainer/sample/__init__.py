"""Prompts → images."""
