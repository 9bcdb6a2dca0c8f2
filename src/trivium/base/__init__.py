"""Errors, configuration, units and log: what every floor above needs and nothing else."""
