"""A checkpoint → a folder for diffusers."""
