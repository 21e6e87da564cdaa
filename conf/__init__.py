"""Experiments and their parts: YAML files that Hydra composes over the dataclasses of options."""
