"""Captions and classes → the condition of the U-Net."""
