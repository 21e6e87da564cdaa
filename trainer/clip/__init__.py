"""Images and captions → a small CLIP."""
