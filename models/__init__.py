"""Tensors in, tensors out: the networks, the diffusion process and its solvers."""
