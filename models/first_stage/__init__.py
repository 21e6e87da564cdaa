"""Autoencoders, their losses and their discriminator."""
