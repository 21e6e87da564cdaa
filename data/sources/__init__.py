"""Read raw images and captions."""
