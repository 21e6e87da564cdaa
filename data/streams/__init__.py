"""Make batches of images and of latents."""
