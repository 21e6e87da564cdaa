"""Noise schedules, training targets, samplers and guidance."""
