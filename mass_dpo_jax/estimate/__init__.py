"""What a train step needs of memory and arithmetic, from formulas: `--config.dry_run=True`."""
