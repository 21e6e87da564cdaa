"""What to run: YAML only, composed by Hydra over the dataclasses of the three config pages."""
