"""Programs that use `data` and `models` without the trainer."""
